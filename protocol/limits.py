"""Every limit of the network, by name, in one place; the relations between them are asserted at the end.

Names end in their unit. Where mission.md or a measurement gives the figure, the comment says so. An operator may raise the
defaults of the HTTP face by flags; what stands here under "wire" is part of the protocol and the same for all.
"""

from __future__ import annotations

# Wire: frames
FRAME_HEADER_BYTES_MAX = 256 * 1024
FRAME_BODY_BYTES_MAX = 64 * 1024 * 1024  # a hidden state of 512 positions x 8,192 x f32 is 16 MiB; four of these
NESTING_MAX = 8

# Wire: envelopes and ads
ENVELOPE_BYTES_MAX = 64 * 1024
AD_BYTES_MAX = 48 * 1024
AD_OFFERS_MAX = 64
AD_ADDRESSES_MAX = 16
AD_GPUS_MAX = 32
AD_PATHS_MAX = 64
AD_LIFETIME_S = 300.0
AD_REFRESH_S = 100.0  # three refreshes fit into a lifetime, so two may be lost
AD_CHANGE_INTERVAL_S = 0.5  # figures that change all the time are sent at most this often
CLOCK_SKEW_S = 60.0  # how far two honest clocks may differ
NAME_CHARS_MAX = 128
TEXT_CHARS_MAX = 1024
BOOK_PEERS_MAX = 20_000
BOOK_REPLY_ENVELOPES_MAX = 128

# Wire: tickets and receipts
TICKET_LIFETIME_S = 600.0
NONCE_BYTES = 16
NONCES_REMEMBERED_MAX = 200_000
ROUTE_STAGES_MAX = 8
DELEGATION_LIFETIME_S = 366 * 86_400.0
CREDIT_MICROS = 1_000_000  # one credit in the integer unit of all prices
PRICE_MICROS_MAX = 10**15

# Wire: jobs
JOBS_PER_LINK_MAX = 1024
JOB_INPUT_BYTES_MAX = 5 * 1024 * 1024  # 128 messages of 32,768 characters, with room for escapes
JOB_CHUNK_TEXT_BYTES_MAX = 64 * 1024
STREAMS_PER_PEER_MAX = 64
HELLO_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 30.0
WORKERS_ENDED_PER_JOB_MAX = 2  # "a job that has ended two workers fails and is not sent to a third Island"

# Chat (mission.md)
MESSAGES_MAX = 128
MESSAGE_CHARS_MAX = 32_768
COMPLETION_TOKENS_MAX = 4096
COMPLETION_TOKENS_DEFAULT = 1024
TEMPERATURE_MAX = 2.0
TEMPERATURE_DEFAULT = 0.7
PENALTY_ABS_MAX = 2.0
LOGIT_BIAS_ENTRIES_MAX = 1024
LOGIT_BIAS_ABS_MAX = 100.0
STOP_STRINGS_MAX = 4
STOP_STRING_CHARS_MAX = 256
TOP_LOGPROBS_MAX = 20
CHOICES_MAX = 16
SEED_MAX = 2**63 - 1

# Grammar: what llama.cpp's parser stands (design.md, Engine)
SCHEMA_BYTES_MAX = 64 * 1024
SCHEMA_DEPTH_MAX = 32
SCHEMA_REPETITIONS_MAX = 1000
GRAMMAR_COMPILE_TIMEOUT_S = 10.0

# Chat templates run in a sandbox: untrusted text out of a model file
TEMPLATE_BYTES_MAX = 256 * 1024
TEMPLATE_OUTPUT_CHARS_MAX = 8 * 1024 * 1024
TEMPLATE_RANGE_MAX = 10_000

# HTTP
BODY_BYTES_MAX = 1_000_000
LOGIN_TRIES_PER_MINUTE = 5
KEEPALIVE_COMMENT_S = 10.0

# Host
CONNECTIONS_MAX = 2000
KEEPALIVE_INTERVAL_S = 4.0
KEEPALIVE_TIMEOUT_S = 6.0
DIAL_TIMEOUT_S = 10.0
RECONNECT_MIN_S = 0.2
RECONNECT_MAX_S = 30.0
DRAIN_S = 30.0
PEERS_REMEMBERED_MAX = 500

# Model store
CACHE_BYTES_DEFAULT = 20 * 1024**3

assert AD_BYTES_MAX < ENVELOPE_BYTES_MAX < FRAME_HEADER_BYTES_MAX
assert 2 * AD_REFRESH_S < AD_LIFETIME_S
assert KEEPALIVE_INTERVAL_S + KEEPALIVE_TIMEOUT_S < 15.0, "a dead Island has to leave the book within 15 s"
assert JOB_INPUT_BYTES_MAX < FRAME_BODY_BYTES_MAX
assert MESSAGES_MAX * MESSAGE_CHARS_MAX <= JOB_INPUT_BYTES_MAX
assert COMPLETION_TOKENS_DEFAULT <= COMPLETION_TOKENS_MAX
assert BODY_BYTES_MAX <= JOB_INPUT_BYTES_MAX
