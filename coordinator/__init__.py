"""The Coordinator decides and keeps the books; its HTTP face speaks OpenAI's API. It reaches Islands through ``ports.IslandPort``."""
