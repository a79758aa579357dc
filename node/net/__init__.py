"""Peer to peer: a libp2p host, framed streams, gossip and discovery. Nothing outside this package imports libp2p."""
