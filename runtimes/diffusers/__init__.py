"""Text to image: pipelines in diffusers' own folder format (Stable Diffusion 1 and 2, Stable Diffusion XL, FLUX).

    folder.py    checks a pipeline's folder before any library opens it
    options.py   what a manifest may say to this runtime
    request.py   what a job asks for
    engine.py    loads the pipeline and makes pictures (``load``)
    worker.py    the process
    shapes/      a small model that the repository trains itself, and its training

In a manifest: ``runtime = "diffusers"``, ``entry`` the pipeline's ``model_index.json``, ``files`` the whole folder under the paths it has
there. Needs the extra ``diffusers``; nothing but the worker imports it.
"""
