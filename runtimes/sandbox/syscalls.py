"""Numbers of the system calls that the filter names, on the two machines that it knows: Linux' unistd.h for each.

From 424 on, a number is the same everywhere. ``None``: the machine has no such call.
"""

from __future__ import annotations

NEWEST_KNOWN = 462  # mseal, Linux 6.10: what came later was not looked at, and is answered with "no such call"

_TABLE = """
acct 163 89
add_key 248 217
adjtimex 159 171
bpf 321 280
chroot 161 51
clock_adjtime 305 266
clock_settime 227 112
clone 56 220
clone3 435 435
create_module 174 -
delete_module 176 106
fanotify_init 300 262
fanotify_mark 301 263
finit_module 313 273
fork 57 -
fsconfig 431 431
fsmount 432 432
fsopen 430 430
fspick 433 433
get_kernel_syms 177 -
init_module 175 105
io_uring_enter 426 426
io_uring_register 427 427
io_uring_setup 425 425
ioctl 16 29
ioperm 173 -
iopl 172 -
ioprio_set 251 30
kcmp 312 272
kexec_file_load 320 294
kexec_load 246 104
keyctl 250 219
kill 62 129
lookup_dcookie 212 18
memfd_create 319 279
memfd_secret 447 447
migrate_pages 256 238
mknod 133 -
mknodat 259 33
modify_ldt 154 -
mount 165 40
mount_setattr 442 442
move_mount 429 429
move_pages 279 239
mq_open 240 180
msgget 68 186
name_to_handle_at 303 264
nfsservctl 180 42
open_by_handle_at 304 265
open_tree 428 428
perf_event_open 298 241
personality 135 92
pidfd_getfd 438 438
pidfd_open 434 434
pidfd_send_signal 424 424
pivot_root 155 41
prctl 157 167
prlimit64 302 261
process_madvise 440 440
process_mrelease 448 448
process_vm_readv 310 270
process_vm_writev 311 271
ptrace 101 117
query_module 178 -
quotactl 179 60
quotactl_fd 443 443
reboot 169 142
request_key 249 218
rt_sigqueueinfo 129 138
rt_tgsigqueueinfo 297 240
sched_setaffinity 203 122
sched_setattr 314 274
sched_setparam 142 118
sched_setscheduler 144 119
semget 64 190
setdomainname 171 162
sethostname 170 161
setns 308 268
setpriority 141 140
settimeofday 164 170
shmget 29 194
socket 41 198
swapoff 168 225
swapon 167 224
syslog 103 116
tgkill 234 131
tkill 200 130
umount2 166 39
unshare 272 97
uselib 134 -
userfaultfd 323 282
vfork 58 -
vhangup 153 58
"""

_ROWS = [line.split() for line in _TABLE.split("\n") if line]
NUMBERS: dict[str, dict[str, int | None]] = {
    machine: {row[0]: None if row[column] == "-" else int(row[column]) for row in _ROWS}
    for column, machine in ((1, "x86_64"), (2, "aarch64"))
}
"""By machine (as ``platform.machine()`` says it) and name."""
