"""ONNX models by onnxruntime: texts to vectors and labels, pictures to labels, boxes, masks and texts, and raw tensors.

    wire.py         reads an ONNX file as far as it names files and operators
    model_file.py   whether a model may be loaded at all
    session.py      onnxruntime with our settings; its errors end here
    options.py      the manifest's options, fields.py a job's input: both read with their types
    texts.py        tokens and batches; embeddings.py, classify.py, spans.py the tasks of texts
    images.py       pictures of strangers to arrays; vision.py, detection.py, recognition.py the tasks of pictures
    tensors.py      arrays by name
    engine.py       ``load``: from a LoadOrder to an engine
    worker.py       the process

Options of a manifest
---------------------
``task`` says what the model is for and which further options there are. An option that the task does not have is refused at load.

Tasks of texts (the model takes input_ids, and attention_mask, token_type_ids, position_ids where it wants them):
``tokenizer`` path of the file (tokenizer.json), ``max_tokens`` of one row (what the tokenizer says, else 512), ``too_long`` truncate or
refuse.

    embeddings                 ``output`` (the first), ``pooling`` mean | cls | last (none for an output of rank 2), ``normalize`` (true)
    feature-extraction         the same under its older name
    text-classification        LABELS, ``activation`` softmax | sigmoid | none
    zero-shot-classification   LABELS of an NLI model, one of them entail…; ``hypothesis_template`` ("This example is {}.")
    token-classification       LABELS with B- and I-, ``outside`` ("O")
    question-answering         ``start_output``, ``end_output``, ``answer_tokens`` (30), ``no_answer`` (false), ``stride`` (64 tokens)
    fill-mask                  ``mask_token`` ("[MASK]")

Tasks of pictures (the model takes one): PREPARATION is ``height``, ``width`` (the model's), ``resize`` stretch | crop | letterbox |
multiple, ``layout`` nchw | nhwc, ``channels`` rgb | bgr, ``scale`` (1/255), ``mean`` and ``std`` (three
numbers each: 0 and 1), ``pad`` (114); a value is (byte * scale - mean) / std.

    image-classification       PREPARATION (crop), LABELS, ``activation`` softmax | sigmoid | none
    object-detection           PREPARATION (letterbox), LABELS, ``style`` yolov8 | yolov5 | boxes, ``threshold`` (0.5),
                               ``iou`` (0.45), ``output``; of style boxes ``boxes``, ``scores``, ``classes`` (names of outputs),
                               ``box_format`` xyxy | cxcywh, ``box_scale`` pixels | unit
    image-segmentation         PREPARATION (stretch), LABELS, ``activation`` sigmoid | none, ``threshold`` (0.5), both for one class
    text-recognition           PREPARATION without width, LABELS (the model's characters; metadata ``character`` where none are given),
                               ``blank`` (0), ``space`` after the characters (true), ``width_min`` (320), ``activation`` none | softmax

    tensors                    none

LABELS is one of ``labels`` (a list), ``labels_file`` (a path: a JSON list, an object with id2label, or one a line) and ``labels_metadata``
(a key of the model's own metadata, one a line); without them LABEL_0, LABEL_1, ….

Input and result
----------------
    embeddings                 {input | text, encoding_format?, dimensions?}  {embeddings, embedding?, dimensions, task}, usage
    text-classification        {text | input}                             {label, score, scores, task}, or {results, count, task} for a list
    zero-shot-classification   {text, labels, multi_label?}               {label, score, scores, task}
    token-classification       {text}                                     {entities, count, label, score, scores, truncated, task}
    question-answering         {question, context}                        {answer, score, start, end, task}
    fill-mask                  {text, top_k?}                             {label, score, scores, sequence, task}
    image-classification       {image, top_k?}                            {label, score, scores, task}
    object-detection           {image, threshold?, iou?}                  {detections, count, task}
    image-segmentation         {image, threshold?}                        image line, {output_shape, num_classes, original_size, shares,
                                                                          task}
    text-recognition           {image | images}                           {text, score, task}, or {text, results, count, task}
    tensors                    {inputs, outputs?, encoding?}              {outputs, task}

``scores`` is an object in falling order. Pictures are PNG or JPEG in base64.
"""
