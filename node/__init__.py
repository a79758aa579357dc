"""The process: command line, settings, one nursery, the libp2p host, gossip, streams, and the roles of Island, Coordinator and Consumer."""

VERSION = "0.1.0"
AGENT = f"archipelag/{VERSION}"
