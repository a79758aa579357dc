"""The Coordinator's HTTP face: OpenAI's API on aiohttp, in the one asyncio thread of the process."""
