"""Every limit of the network, by name, in one place; the relations between them are asserted at the end.

Names end in their unit. Where mission.md or a measurement gives the figure, the comment says so. An operator may raise the
defaults of the HTTP face by flags; what stands here under "wire" is part of the protocol and the same for all.
"""

from __future__ import annotations

# Wire: frames
FRAME_HEADER_BYTES_MAX = 256 * 1024
FRAME_BODY_BYTES_MAX = 64 * 1024 * 1024  # a hidden state of 512 positions x 8,192 x f32 is 16 MiB; four of these
ARRAY_ENTRIES_MAX = 4096  # entries of one array inside a header or an envelope

# Wire: envelopes and ads
ENVELOPE_BYTES_MAX = 64 * 1024
AD_BYTES_MAX = 48 * 1024
AD_OFFERS_MAX = 64
AD_ADDRESSES_MAX = 16
AD_GPUS_MAX = 32
AD_SHARDS_MAX = 16
AD_PATHS_MAX = 64
AD_LOADING_MAX = 8
AD_LOADING_INTERVAL_S = 2.0  # how far downloads are is said at most this often
AD_LIFETIME_S = 300.0
AD_REFRESH_S = 100.0  # three refreshes fit into a lifetime, so two may be lost
AD_CHANGE_INTERVAL_S = 0.5  # figures that change all the time are sent at most this often
CLOCK_SKEW_S = 60.0  # how far two honest clocks may differ
NAME_CHARS_MAX = 128
TEXT_CHARS_MAX = 1024
BOOK_PEERS_MAX = 20_000
BOOK_REPLY_ENVELOPES_MAX = 128
BOOK_REPLY_BYTES_MAX = 192 * 1024  # an answer travels in the header of one frame
BOOK_REQUEST_PEERS_MAX = 512  # 61 bytes each; larger books are compared a part at a time
CATCHUP_INTERVAL_S = 5.0  # each node compares its book with one neighbour's this often

# Wire: tickets and receipts
TICKET_LIFETIME_S = 600.0
NONCE_BYTES = 16
NONCES_REMEMBERED_MAX = 200_000
ROUTE_STAGES_MAX = 8
LAYERS_MAX = 1024
STAGE_ROWS_MAX = 1024  # rows of one frame between stages
STAGE_FILL_ROWS = 256  # kept rows are sent again in frames of so many
STAGE_FILL_BYTES = 16 * 1024 * 1024  # and so much of them is asked for at a time
MODEL_PARTS_MAX = 256
DELEGATION_LIFETIME_S = 366 * 86_400.0
CREDIT_MICROS = 1_000_000  # one credit in the integer unit of all prices
PRICE_MICROS_MAX = 10**15

# Wire: the direct path
COUNT_EVERY_TOKENS = 64  # what a Consumer's ticket asks for at least: an Island risks so many; a count costs both ends 0.15 ms together
COUNT_EVERY_S = 0.25  # or the tokens that it makes in so long, where it is faster: it risks no more work, and does not wait for signatures
COUNT_BYTES_MAX = 512  # a signed count in its envelope has about 330
COUNT_WAIT_S = 10.0  # an Island that may send no more waits so long for the holder's count
COUNT_FINAL_S = 5.0  # and so long after JobDone for the count of all tokens
CLAIM_LIFETIME_S = 86_400.0  # from the end of a job; afterwards its ticket is not paid any more
CLAIMS_KEPT_MAX = 10_000  # about 2 KB each
DESK_REQUESTS_MAX = 256  # open at once on one stream
DESK_ATTEMPTS_MAX = 128  # of a job that is settled: 64 choices, and as many that another Island had to take over
DESK_ATTEMPTS_BYTES_MAX = 192 * 1024  # they travel in the header of one frame
DESK_POLICY_BYTES_MAX = 4096
DESK_PLACEMENT_BYTES_MAX = 32 * 1024
DESK_ISLANDS_MAX = 64  # that a ticket is not wanted for
DESK_MODELS_MAX = 1000
DESK_PLACES_PER_ACCOUNT_MAX = 512  # tickets of one account in use at once: as much as four large Islands can do
DESK_GONE_S = 10.0  # places of a bridge whose streams have all ended are free then: its redials come within a second
DESK_LOST_WAIT_S = 1.0  # a Consumer may see an Island's death a little before its Coordinator does
DESK_WRONG_KEYS_PER_MINUTE = 5  # of one peer (mission.md: "5 log-in tries a minute an address")

# Wire: jobs
JOBS_PER_LINK_MAX = 1024
LEASE_RENEW_S = 30.0  # mission.md: "renewed every 30 s"
LEASE_S = 60.0  # "each renewal +60 s"
JOB_INPUT_BYTES_MAX = 5 * 1024 * 1024  # 128 messages of 32,768 characters, with room for escapes
JOB_LINES_BYTES_MAX = 9 * 1024 * 1024  # of one frame: whole lines, at least one
JOB_LINES_ROOM_BYTES = 256 * 1024  # of lines that a holder has not taken; an Island that has sent so much waits
JOB_CHUNK_TEXT_BYTES_MAX = 64 * 1024
JOB_CHUNK_LOGPROBS_BYTES_MAX = 128 * 1024
STREAMS_PER_PEER_MAX = 64
HELLO_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 30.0
WORKERS_ENDED_PER_JOB_MAX = 2  # "a job that has ended two workers fails and is not sent to a third Island"

# Wire: blobs
BLOB_CHUNK_BYTES = 1024 * 1024  # one leaf of a blob's tree, one message; a 20 GB model has a tree of 640 KB
BLOB_BYTES_MAX = 256 * 1024**3  # its tree has 8 MiB
BLOB_REQUEST_CHUNKS_MAX = 16  # of one request
BLOB_REQUESTS_OPEN_MAX = 16  # on one stream, answered in their order
BLOB_STREAMS_PER_PEER_MAX = 2  # one to fetch over, and one that is being opened anew
BLOB_STREAMS_MAX = 32  # that one Island serves at once
BLOB_SEND_S = 30.0  # a peer that has not taken one chunk by then is not reading
BLOB_IDLE_S = 120.0  # and a stream on which nothing is asked for so long ends
BLOB_TREE_WAIT_S = 60.0  # to read a large file once, where nobody has asked for its tree before
BLOB_PEERS_ASKED_MAX = 8  # that one blob is asked from; more share the same line at home
BLOB_SERVE_BYTES_S_MAX = 256 * 1024**2  # to one peer, by default: two streams are not worth the whole machine

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

# Chat: tools (OpenAI's own limits, where it has any)
TOOLS_MAX = 128
TOOLS_BYTES_MAX = 256 * 1024  # names, descriptions and parameters of all tools of a request
TOOL_NAME_CHARS_MAX = 64
TOOL_CALLS_MAX = 128  # of one message
TOOL_CALL_ID_CHARS_MAX = 128

# Vectors and pictures (OpenAI's own limits; mission.md)
TEXTS_MAX = 2048  # of one request for embeddings
PROMPT_CHARS_MAX = 32_000  # of a picture; a Cargo may have a lower one
IMAGES_MAX = 10  # of one request
SIDE_PX_MAX = 1024
STEPS_MAX = 150
GUIDANCE_MAX = 50.0

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
JOB_INPUT_JSON_BYTES_MAX = 256 * 1024  # of POST /api/v1/jobs (mission.md)
JOBS_LISTED_MAX = 100
LOGIN_TRIES_PER_MINUTE = 5
KEEPALIVE_COMMENT_S = 10.0
HEADERS_WAIT_S = 1.0  # so long a stream's headers wait for the first token, so that they name the Island that gave it

# Files, and batches of their lines (OpenAI's Files and Batch API; design.md, HTTP)
FILE_BYTES_MAX = 100_000_000
FILE_PIECE_BYTES = 1024 * 1024  # is sealed and stored at a time
FILES_MAX = 1000  # of one account
FILES_BYTES_MAX = 2 * 1024**3  # of all files of one account together
FILES_LISTED_MAX = 10_000
FILE_RETENTION_S = 30 * 86_400.0  # unless the file says less
FILE_EXPIRY_MIN_S = 3600.0
FILE_UPLOAD_S = 3600.0  # what is not whole by then is deleted
FILE_LINES_MAX = 50_000
FILE_LINE_BYTES_MAX = BODY_BYTES_MAX + 64 * 1024  # a body, and what names it
FILE_BATCH_WINDOW_S = 86_400.0
FILE_BATCHES_OPEN_MAX = 50  # of one account
FILE_BATCHES_LISTED_MAX = 100
FILE_BATCH_ERRORS_SHOWN_MAX = 100  # in a batch itself; all of them stand in its error file

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
SOURCE_REDIRECTS_MAX = 5
SOURCE_WHEEL_BYTES_MAX = 8 * 1024**3  # of one wheel that a stranger's manifest names; the index itself takes no larger ones

assert BLOB_CHUNK_BYTES <= FRAME_BODY_BYTES_MAX and BLOB_BYTES_MAX // BLOB_CHUNK_BYTES * 32 <= FRAME_BODY_BYTES_MAX
assert AD_BYTES_MAX < ENVELOPE_BYTES_MAX < FRAME_HEADER_BYTES_MAX
assert ENVELOPE_BYTES_MAX + 1024 <= BOOK_REPLY_BYTES_MAX < FRAME_HEADER_BYTES_MAX - 16 * BOOK_REPLY_ENVELOPES_MAX
assert BOOK_REQUEST_PEERS_MAX * 128 < FRAME_HEADER_BYTES_MAX
assert max(BOOK_REQUEST_PEERS_MAX, LOGIT_BIAS_ENTRIES_MAX, MESSAGES_MAX) <= ARRAY_ENTRIES_MAX
assert 2 * AD_REFRESH_S < AD_LIFETIME_S
assert KEEPALIVE_INTERVAL_S + KEEPALIVE_TIMEOUT_S + CATCHUP_INTERVAL_S <= 15.0, (
    "one missed notice is made up for in time"
)
assert KEEPALIVE_INTERVAL_S + KEEPALIVE_TIMEOUT_S < 15.0, "a dead Island has to leave the book within 15 s"
assert JOB_CHUNK_TEXT_BYTES_MAX + JOB_CHUNK_LOGPROBS_BYTES_MAX + 1024 <= FRAME_HEADER_BYTES_MAX
assert JOB_INPUT_BYTES_MAX < FRAME_BODY_BYTES_MAX
assert MESSAGES_MAX * MESSAGE_CHARS_MAX <= JOB_INPUT_BYTES_MAX
assert COMPLETION_TOKENS_DEFAULT <= COMPLETION_TOKENS_MAX
assert COUNT_EVERY_TOKENS <= COMPLETION_TOKENS_MAX
assert 2 * LEASE_RENEW_S <= LEASE_S, "one renewal may be late"
assert ENVELOPE_BYTES_MAX < DESK_ATTEMPTS_BYTES_MAX < FRAME_HEADER_BYTES_MAX - 16 * DESK_ATTEMPTS_MAX
assert BODY_BYTES_MAX <= JOB_INPUT_BYTES_MAX
assert FILE_EXPIRY_MIN_S <= FILE_BATCH_WINDOW_S <= FILE_RETENTION_S and FILE_BYTES_MAX <= FILES_BYTES_MAX

# Network layer (node/net)
STREAM_WINDOW_BYTES = 16 * 1024 * 1024  # more than the usual message, or each message waits one round trip longer
CONNECTION_WINDOW_BYTES_MAX = 128 * 1024 * 1024  # what one peer may make us buffer beyond the small first windows
CONTROL_BYTES_MAX = 64 * 1024  # answers that a peer does not fetch; past this it is not reading at all
WRITE_STALL_S = 30.0  # one batch of at most 256 KiB may take this long to leave
HANDSHAKE_TIMEOUT_S = 10.0
DIAL_STAGGER_S = 0.25  # head start of one address of a peer over the next (RFC 8305 recommends 250 ms)
RECONNECT_HELD_MAX_S = 1.0  # cap for peers that we must hold: "a redial works within 2 s of its return"
PEER_EVENTS_QUEUED_MAX = 4096
GOSSIP_QUEUED_MAX = 4096
GOSSIP_SEEN_S = 120.0
PEERS_WANTED = 8  # connections that discovery strives for: more than the gossip mesh's low mark, less than its high one
PEERS_FILE_BYTES_MAX = 4 * 1024 * 1024
PEERS_SAVE_INTERVAL_S = 5.0
MDNS_ADDRESSES_MAX = 8

assert AD_ADDRESSES_MAX * DIAL_STAGGER_S < DIAL_TIMEOUT_S, "the last address must get its turn"
assert CONNECTION_WINDOW_BYTES_MAX >= STREAM_WINDOW_BYTES >= BLOB_REQUEST_CHUNKS_MAX * BLOB_CHUNK_BYTES

# Engine (runtimes/gguf)
ENGINE_SLOTS_MAX = 128  # with as many remembered prefixes this stays within llama.cpp's 256 sequences
ENGINE_WAITING_MAX = 64  # jobs that wait for room inside an Island before it says no_capacity
WORKER_LOAD_TIMEOUT_S = 900.0  # a large model from a slow disk
WORKER_STALL_S = 120.0  # a worker that has jobs and says nothing for so long is ended
WORKER_RESTART_MIN_S = 0.2
WORKER_RESTART_MAX_S = 30.0
WORKER_EXIT_S = 2.0
GBNF_BYTES_MAX = 192 * 1024
GRAMMARS_REMEMBERED_MAX = 256
GRAMMAR_MEMORY_BYTES_MAX = 2 * 1024**3
GRAMMAR_STEP_S_MAX = 0.25  # a grammar that needs longer for one token would hold up all other answers
TEMPLATE_STEPS_MAX = 200_000  # rounds of loops and calls in one rendering; 128 messages need a few thousand
CHUNK_TOKENS_MAX = 256  # chunks that wait for a slow reader are joined up to here

assert GBNF_BYTES_MAX < FRAME_HEADER_BYTES_MAX

# Coordinator
CAPACITY_WAIT_S = 30.0  # how long a job waits where all Islands are full
ISLAND_WAIT_S = 5.0  # how long it waits for an Island to come back where none is left
PLACE_RETRY_S = 0.25
NO_CAPACITY_REST_S = 0.25  # an Island that said that it is full is left alone that long, doubled each time up to 2 s
NO_CAPACITY_REST_MAX_S = 2.0
WAITING_JOBS_MAX = 2000
CANDIDATES_MAX = 64  # Islands that are considered for one pipeline
CARGO_REMEMBERED_S = 300.0  # so long "nobody offers it now" is told from "unknown model"
CARGOS_REMEMBERED_MAX = 1000
KEPT_LINES_BYTES_MAX = 48 * 1024 * 1024  # of an answer that is kept: ten pictures of 1,024 x 1,024 as they are have 40 MiB in base64
JOB_ATTEMPTS_MAX = 8
JOB_TIMEOUT_S = 600.0
RETRY_WINDOW_S = 300.0  # so long a chat's answer is kept, sealed, for a client that asks again after it was cut off
RESULT_RETENTION_S = 3600.0  # and so long that of a job that was submitted
RUN_RETENTION_S = 86_400.0  # and so long those of a batch or a workflow, after its end
JOB_TRIES_MAX = 3  # a job whose Coordinator is gone is run again at most so often in all (mission.md)
COMPLETION_CHOICES_MAX = 64  # prompts x n of one completion request
RESPONSE_BUFFER_EVENTS_MAX = 256

# Pipelines
ROUTE_OPEN_S = 15.0  # all stages of a route have answered by then
STAGE_ORPHAN_S = 30.0  # so long a stage keeps what it computed for a driver that is lost
STAGE_STALL_S = 1.5  # a step that is away so much longer than usual makes the driver ask how the stages do
STAGE_PROBE_S = 1.0  # a stage that does not answer by then is frozen or gone
STAGE_STANDSTILL_S = 10.0  # an engine that works on one batch for so long and much longer than usual stands still
STAGE_SLOW_FACTOR = 4.0  # a stage this much slower than it was is worth replacing
STAGE_SLOW_STEPS = 24
MEND_WAIT_S = 30.0  # how long a broken route waits for an Island that can take the place
SHARD_LOAD_S = 1800.0

# Batches (coordinator/batches)
BATCH_INPUTS_MAX = 100  # mission.md: "1-100 inputs"
BATCH_BODY_BYTES_MAX = 32_000_000
BATCHES_OPEN_MAX = 50  # of one account
BATCH_OUTPUT_BYTES_MAX = 64 * 1024 * 1024  # of all inputs, told at once; pictures beyond that are read job by job
BATCH_RUNNING_MAX = 256  # jobs of one batch at once, however many slots there are: each is a task and a hold
BATCH_ITEM_TRIES_MAX = 3  # of one input, where it failed for a reason that passes
BATCH_ITEM_ATTEMPTS_MAX = 16  # all jobs of one input, those that a Coordinator left and second copies too

assert BATCH_INPUTS_MAX * JOB_INPUT_JSON_BYTES_MAX < BATCH_BODY_BYTES_MAX
assert 2 * BATCH_ITEM_TRIES_MAX < BATCH_ITEM_ATTEMPTS_MAX

# Workflows: definitions
FLOW_STEPS_MAX = 200
FLOW_KEY_CHARS_MAX = 64
FLOW_DEFINITION_BYTES_MAX = 256 * 1024  # as compact JSON; one that is all templates takes a second to read
FLOW_DEPTH_MAX = 32  # of inputs and mappings
FLOW_POINTER_CHARS_MAX = 512
FLOW_TASKS_MAX = 20_000  # of one run: steps, and items of those that fan out, taken at their largest
FLOW_ITEMS_MAX = 10_000  # of one step
FLOW_ITEMS_DEFAULT = 100  # where max_items says nothing
FLOW_ATTEMPTS_MAX = 10
FLOW_ATTEMPTS_DEFAULT = 3  # of on_failure "retry"
FLOW_BACKOFF_S_MAX = 3600.0
FLOW_BACKOFF_FACTOR_MAX = 10.0
FLOW_TIMEOUT_S_MAX = 3600.0

# Workflows: templates run in a process of their own
FLOW_TEMPLATE_CHARS_MAX = 32_768  # as a message
FLOW_TEMPLATE_DEPTH_MAX = 64  # of its syntax tree
FLOW_RENDER_CPU_S = 0.5
FLOW_RENDER_WALL_S = 1.5  # the machine may be busy; what takes longer is ended all the same
FLOW_RENDER_START_S = 20.0  # a worker has started by then: a busy machine, cold files
FLOW_RENDER_BYTES_MAX = 256 * 1024  # as the input of a job
FLOW_RENDER_RANGE_MAX = 10_000
FLOW_RENDER_MEMORY_BYTES_MAX = 256 * 1024 * 1024
FLOW_VARIABLES_BYTES_MAX = 4 * 1024 * 1024  # of what one template looks at
FLOW_RENDERS_AT_ONCE = 2
FLOW_RENDERS_WAITING_MAX = 1024

# Workflows: runs (coordinator/workflows)
FLOW_RUNS_OPEN_MAX = 200  # of one account
FLOW_PARALLEL_MAX = 64  # tasks of one run at once
FLOW_LEAVE_S = 30.0  # what runs may take to end where the database is away
FLOW_TAKEN_BYTES_MAX = 32 * 1024 * 1024  # of outputs that a run takes over from another
FLOW_SHOWN_BYTES_MAX = 64 * 1024 * 1024  # of all that a run's jobs have said, told at once
FLOW_OUTPUT_BYTES_MAX = 16 * 1024 * 1024  # of what a run's own output gives
FLOW_VERSIONS_MAX = 1_000  # saved by one account

assert FLOW_STEPS_MAX <= FLOW_ITEMS_MAX <= FLOW_TASKS_MAX
assert FLOW_RENDER_BYTES_MAX <= JOB_INPUT_JSON_BYTES_MAX and FLOW_RENDER_CPU_S < FLOW_RENDER_WALL_S
assert FLOW_TEMPLATE_CHARS_MAX <= MESSAGE_CHARS_MAX and FLOW_DEFINITION_BYTES_MAX < BODY_BYTES_MAX

# A/B tests (coordinator/abtests)
AB_TESTS_MAX = 100  # of one account, that have not ended
AB_VARIANTS_MAX = 8
AB_NAME_CHARS_MAX = 64  # of a test, and of a variant
AB_SHARE_TOLERANCE_PERCENT = 0.001  # by which shares may miss 100: three variants of 33.333
AB_SAMPLES_MIN = 1  # units of an arm; below decision.UNITS_MIN nothing is concluded, whatever a test asks for
AB_SAMPLES_MAX = 1_000_000_000
AB_HOURS_MAX = 8_760  # a year
AB_ALPHA_MIN = 0.0001
AB_ALPHA_MAX = 0.2
AB_RAMP_STEPS_MAX = 16
AB_UNIT_CHARS_MAX = 256  # of what a request says of its user; the rest is passed over

# Cargos
CARGO_NAME_CHARS_MAX = 64
CARGO_MANIFEST_BYTES_MAX = 60 * 1024  # fits into an envelope
CARGO_JSON_BYTES_MAX = 12 * 1024  # options, and each of the schemas
CARGO_FILES_MAX = 256
CARGO_FILE_BYTES_MAX = 2**42  # of all files together, and of what a job may need: 4 TiB
CARGO_PATH_CHARS_MAX = 200
CARGO_PATH_DEPTH_MAX = 8
CARGO_TIME_S_MAX = 600
CARGO_THREADS_MAX = 64
CARGO_OUTPUT_BYTES_DEFAULT = 16 * 1024 * 1024
CARGO_OUTPUT_BYTES_MAX = 256 * 1024 * 1024
CARGO_CACHE_TTL_S_MAX = 30 * 86_400
CARGO_CACHE_TTL_S_DEFAULT = 3_600
CARGO_CACHE_SIMILARITY_MILLI_DEFAULT = 850
SHELF_CARGOS_MAX = 10_000  # that one node knows
SHELF_REVOCATIONS_MAX = 100_000
SHELF_PROMOTIONS_MAX = 10_000  # one for each name
PROMOTION_SERIAL_MAX = 2**53
PROMOTION_ORIGIN_CHARS_MAX = 128
SHELF_EARLY_MAX = 10_000  # revocations by publishers of whom a node knows nothing
CARGO_PROOF_BYTES_MAX = 1024  # a signed listing or delegation has about 350
CARGO_NOTICES_MAX = 512  # of one message, which travels in the header of one frame
CARGO_NOTICES_BYTES_MAX = 192 * 1024
CARGO_KEYS_MAX = 4096  # that are compared at a time; what knows more compares in parts
CARGO_USELESS_PER_S = 5.0  # notices of one peer that cost a look at their signatures and bring nothing new
CARGO_USELESS_BURST = 600.0  # and so many at once; each takes 0.15 ms
CARGO_TOLD_PER_S = 20.0  # gossip of one peer about Cargos, good or bad; more is dropped, catching up brings it
CARGO_TOLD_BURST = 600.0
CARGO_PASSED_S = 60.0  # so long after a node has first heard it gossip of it is passed on
assert CARGO_MANIFEST_BYTES_MAX + 1024 <= ENVELOPE_BYTES_MAX
assert CARGO_MANIFEST_BYTES_MAX + 1024 + 2 * CARGO_PROOF_BYTES_MAX <= ENVELOPE_BYTES_MAX, "a notice fits into a gossip message"
assert ENVELOPE_BYTES_MAX + 2 * CARGO_PROOF_BYTES_MAX <= CARGO_NOTICES_BYTES_MAX < FRAME_HEADER_BYTES_MAX - 48 * CARGO_NOTICES_MAX
assert 32 * CARGO_KEYS_MAX <= FRAME_BODY_BYTES_MAX and CARGO_NOTICES_MAX <= CARGO_USELESS_BURST

# Cargos: what goes in and comes out (protocol/cargo_io.py); the input has JOB_INPUT_BYTES_MAX
CARGO_LINE_BYTES_MAX = 8 * 1024 * 1024  # an image of 1,024 x 1,024 x 3 bytes as it is has 4 MiB in base64
CARGO_LINES_MAX = 100_000
CARGO_TOKEN_BYTES_MAX = 64 * 1024  # as JOB_CHUNK_TEXT_BYTES_MAX
CARGO_STEPS_MAX = 2**53
CARGO_TOKENS_MAX = 2**31
CARGO_IMAGE_FORMAT_CHARS_MAX = 16
CARGO_IMAGE_SIDE_MAX = 8192

# WASM (runtimes/wasm); fuel, time, stack and memory as in mission.md and the original
WASM_FUEL_MAX = 10**11
WASM_TIMEOUT_S = 60.0
WASM_MEMORY_BYTES_MAX = 256 * 1024**2
WASM_STACK_BYTES_MAX = 512 * 1024
WASM_MODULE_BYTES_MAX = 32 * 1024 * 1024
WASM_TABLE_ELEMENTS_MAX = 100_000
WASM_STDERR_BYTES_MAX = 16 * 1024  # of what a module writes there; the rest is dropped
LINE_LOAD_TIMEOUT_S = 60.0  # to compile one module
LINE_OVERRUN_S = 2.0  # a worker that does not give a job up so long after it was told to, or after its time, is ended
LINE_WINDOW_BYTES = 256 * 1024  # of output that a reader has not taken: a module that writes more waits
LINE_JOBS_WAITING_MAX = 64  # jobs that wait for a worker before an Island says no_capacity
LINE_LANES_MAX = 64

assert CARGO_LINE_BYTES_MAX < JOB_LINES_BYTES_MAX <= FRAME_BODY_BYTES_MAX
assert CARGO_LINE_BYTES_MAX < CARGO_OUTPUT_BYTES_DEFAULT <= CARGO_OUTPUT_BYTES_MAX
assert CARGO_TOKEN_BYTES_MAX <= JOB_CHUNK_TEXT_BYTES_MAX
assert WASM_MODULE_BYTES_MAX < FRAME_BODY_BYTES_MAX
assert WASM_STDERR_BYTES_MAX < FRAME_HEADER_BYTES_MAX
