/* A Cargo for the tests: does what the input's "mode" says. Most modes attack; what they win they say in their done line. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static char input[1 << 20];
static char won[8192];
static long count;

static void win(const char *what) {
    size_t used = strlen(won);
    snprintf(won + used, sizeof won - used, "%s\"%s\"", used ? "," : "", what);
}

static void win_if(int is_won, const char *what) {
    if (is_won) win(what);
}

static int done(void) {
    printf("{\"type\":\"done\",\"won\":[%s],\"count\":%ld}\n", won, count);
    fflush(stdout);
    return 0;
}

static void hang(void) {
    for (;;) pause();
}

/* The string after "name":" in the input, or empty. */
static void field(const char *name, char *value, size_t size) {
    char pattern[64];
    snprintf(pattern, sizeof pattern, "\"%s\":\"", name);
    const char *at = strstr(input, pattern);
    value[0] = 0;
    if (!at) return;
    at += strlen(pattern);
    size_t length = strcspn(at, "\"");
    if (length >= size) length = size - 1;
    memcpy(value, at, length);
    value[length] = 0;
}

static void read_input(void) {
    size_t used = 0;
    ssize_t got;
    while (used < sizeof input - 1 && (got = read(0, input + used, sizeof input - 1 - used)) > 0) used += got;
    while (used && (input[used - 1] == '\n')) used--;
    input[used] = 0;
}

static int echo(void) {
    printf("{\"type\":\"status\",\"message\":\"reading\"}\n");
    printf("{\"type\":\"done\",\"input\":%s,\"seed_hex\":\"%s\"}\n", input, getenv("CARGO_SEED"));
    return 0;
}

/* Some 13 MB. */
static int stream(void) {
    static char filler[32 * 1024];
    memset(filler, 'x', sizeof filler - 1);
    for (int i = 0; i < 400; i++) {
        printf("{\"type\":\"progress\",\"step\":%d,\"total\":400,\"filler\":\"%s\"}\n", i, filler);
        fflush(stdout);
    }
    return done();
}

static int flood(void) {
    static char line[1 << 16];
    size_t used = 0;
    const char *token = "{\"type\":\"token\",\"content\":\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"}\n";
    while (used + strlen(token) < sizeof line) {
        strcpy(line + used, token);
        used += strlen(token);
    }
    for (long long written = 0; written < 10LL << 30; written += used)
        if (write(1, line, used) < 0) return 1;
    return done();
}

static int fork_bomb(void) {
    for (int i = 0; i < 5000; i++) {
        pid_t child = fork();
        if (child == 0) hang();
        if (child > 0) count++;
    }
    return done();
}

static int memory_bomb(void) {
    for (;;) {
        char *piece = malloc(1 << 20);
        if (piece) memset(piece, 1, 1 << 20);
    }
    return 0;
}

/* The same in a child: the parent lives on and says done. */
static int memory_bomb_child(void) {
    pid_t child = fork();
    if (child == 0) return memory_bomb();
    int status = 0;
    waitpid(child, &status, 0);
    win_if(WIFEXITED(status), "lived");
    return done();
}

static long fill(const char *path) {
    static char piece[1 << 16];
    memset(piece, 1, sizeof piece);
    long written = 0;
    for (int i = 0; i < 100000; i++) {
        char name[256];
        snprintf(name, sizeof name, "%s/fill%d", path, i);
        int file = open(name, O_CREAT | O_WRONLY, 0600);
        if (file < 0) break;
        ssize_t got;
        long before = written;
        while ((got = write(file, piece, sizeof piece)) > 0) written += got;
        close(file);
        if (written == before) break;
    }
    return written;
}

static int disk_scratch(void) {
    signal(SIGXFSZ, SIG_IGN);
    count = fill("/tmp");
    return done();
}

static int disk_elsewhere(void) {
    const char *places[] = {"/", "/run", "/var/tmp", "/etc", "/dev", "/proc", "/sys", "/sys/fs/cgroup/memory", "/sys/fs/cgroup", "/data"};
    signal(SIGXFSZ, SIG_IGN);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) win_if(fill(places[i]) > 0, places[i]);
    count = fill("/dev/shm");
    return done();
}

static int one_big_file(void) {
    static char piece[1 << 20];
    signal(SIGXFSZ, SIG_IGN);
    int file = open("/tmp/big", O_CREAT | O_WRONLY, 0600);
    while (write(file, piece, sizeof piece) > 0) count += sizeof piece;
    return done();
}

static int network(void) {
    char port[16];
    field("port", port, sizeof port);
    const char *hosts[] = {"127.0.0.1", "1.1.1.1", "169.254.169.254", "10.88.0.1"};
    for (size_t i = 0; i < 4; i++) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
        inet_pton(AF_INET, hosts[i], &to.sin_addr);
        int tcp = socket(AF_INET, SOCK_STREAM | (i ? SOCK_NONBLOCK : 0), 0); /* the first answers at once */
        int got = tcp < 0 ? -1 : connect(tcp, (struct sockaddr *)&to, sizeof to);
        win_if(got == 0 || (got < 0 && errno == EINPROGRESS), hosts[i]);
        int udp = socket(AF_INET, SOCK_DGRAM, 0);
        win_if(i && sendto(udp, "x", 1, 0, (struct sockaddr *)&to, sizeof to) == 1, "udp");
    }
    char name[128];
    field("socket", name, sizeof name);
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    strncpy(local.sun_path + 1, name, sizeof local.sun_path - 2); /* abstract: it belongs to the network namespace */
    int unix_socket = socket(AF_UNIX, SOCK_STREAM, 0);
    win_if(!connect(unix_socket, (struct sockaddr *)&local, sizeof(sa_family_t) + 1 + strlen(name)), "abstract socket");
    win_if(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) >= 0, "raw socket");
    win_if(socket(AF_PACKET, SOCK_RAW, 0) >= 0, "packet socket");
    win_if(socket(AF_VSOCK, SOCK_STREAM, 0) >= 0, "hypervisor socket");
    win_if(socket(AF_ALG, SOCK_SEQPACKET, 0) >= 0, "kernel's ciphers");
    win_if(socket(AF_NETLINK, SOCK_RAW, 9) >= 0, "audit socket");
    return done();
}

static int readable(const char *path) {
    char piece[64];
    int file = open(path, O_RDONLY | O_NONBLOCK);
    int has_read = file >= 0 && read(file, piece, sizeof piece) > 0;
    if (file >= 0) close(file);
    return has_read;
}

/* Docker makes an /etc/hosts of its own; podman can be made to show the host's. */
static int knows_hosts(const char *line) {
    static char text[1 << 16];
    int file = open("/etc/hosts", O_RDONLY);
    if (file < 0) return 0;
    ssize_t got = read(file, text, sizeof text - 1);
    close(file);
    return got > 0 && line[0] && strstr(text, line) != NULL;
}

static int host_files(void) {
    char path[512], outside[1024], secret[128], line[512];
    field("hosts", line, sizeof line);
    win_if(knows_hosts(line), "/etc/hosts");
    field("path", path, sizeof path);
    field("secret", secret, sizeof secret);
    win_if(readable(path), "file");
    snprintf(outside, sizeof outside, "/proc/1/root%s", path);
    win_if(readable(outside), "file by proc");
    snprintf(outside, sizeof outside, "../../../../../../../..%s", path);
    win_if(readable(outside), "file by dots");
    const char *places[] = {"/etc/shadow", "/etc/gshadow", "/home", "/proc/kcore", "/dev/mem", "/dev/sda", "/dev/vda", "/proc/sysrq-trigger",
                            "/var/run/docker.sock", "/run/podman/podman.sock", "/proc/keys", "/dev/kmsg"};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) win_if(readable(places[i]), places[i]);
    extern char **environ;
    for (char **word = environ; *word; word++) win_if(strstr(*word, secret) != NULL, "environment");
    for (int file = 3; file < 1024; file++) win_if(fcntl(file, F_GETFD) >= 0, "inherited descriptor");
    return done();
}

static int write_root(void) {
    const char *paths[] = {"/job", "/new", "/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper",
                           "/sys/fs/cgroup/memory/release_agent", "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                           "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/cgroup.procs"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) win_if(open(paths[i], O_WRONLY | O_CREAT, 0600) >= 0, paths[i]);
    win_if(!unlink("/job"), "unlink");
    win_if(!mkdir("/folder", 0700), "mkdir");
    win_if(!chmod("/job", 0777), "chmod");
    return done();
}

static int become_root(void) {
    win_if(!setuid(0), "setuid");
    win_if(!setgid(0), "setgid");
    win_if(!setresuid(-1, 0, 0), "setresuid");
    gid_t group = 0;
    win_if(!setgroups(1, &group), "setgroups");
    win_if(geteuid() == 0 || getegid() == 0, "is root");
    win_if(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1, "may gain privileges");
    for (int capability = 0; capability < 64; capability++)
        win_if(prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1, "has capabilities");
    pid_t child = fork(); /* /suid is this program with the setuid bit, owned by root */
    if (child == 0) {
        execl("/suid", "/suid", "whoami", (char *)NULL);
        _exit(9);
    }
    int status = 0;
    waitpid(child, &status, 0);
    win_if(WEXITSTATUS(status) == 42, "setuid program");
    win_if(WEXITSTATUS(status) == 9, "no setuid program to try");
    return done();
}

static int mounts(void) {
    win_if(!mount("none", "/tmp", "tmpfs", 0, ""), "mount");
    win_if(!mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL), "remount");
    win_if(!umount2("/proc/sysrq-trigger", MNT_DETACH), "umount");
    win_if(!chroot("/tmp"), "chroot");
    win_if(!mknod("/tmp/disk", S_IFBLK | 0600, makedev(254, 0)), "mknod");
    win_if(!unshare(CLONE_NEWUSER), "user namespace");
    win_if(!unshare(CLONE_NEWNS), "mount namespace");
    pid_t child = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (child == 0) _exit(0);
    win_if(child > 0, "clone with a user namespace");
    win_if(!sethostname("x", 1), "hostname");
    win_if(syscall(SYS_keyctl, 0, -3, 1) >= 0, "keyring");
    win_if(syscall(SYS_bpf, 0, input, 64) >= 0, "bpf");
    win_if(syscall(SYS_init_module, input, 10, "") >= 0, "kernel module");
    win_if(syscall(SYS_kexec_load, 0, 0, 0, 0) >= 0, "kexec");
    return done();
}

static int exec_scratch(void) {
    int from = open("/job", O_RDONLY), to = open("/tmp/job", O_CREAT | O_WRONLY, 0755);
    char piece[4096];
    ssize_t got;
    while ((got = read(from, piece, sizeof piece)) > 0) win_if(write(to, piece, got) < 0, "no room");
    close(to);
    pid_t child = fork();
    if (child == 0) {
        execl("/tmp/job", "/tmp/job", "whoami", (char *)NULL);
        _exit(9);
    }
    int status = 0;
    waitpid(child, &status, 0);
    win_if(WEXITSTATUS(status) != 9, "ran a program from /tmp");
    return done();
}

static int others(void) {
    char host_pid[16];
    field("pid", host_pid, sizeof host_pid);
    for (int pid = 2; pid < 70000; pid++) {
        if (pid == getpid()) continue;
        win_if(!kill(pid, 0), "sees a process");
        if (pid < 3000) win_if(!ptrace(PTRACE_ATTACH, pid, 0, 0), "traces a process");
    }
    win_if(!kill(atoi(host_pid), SIGKILL), "kills by number");
    kill(-1, SIGKILL);
    win_if(!setpriority(PRIO_PROCESS, 0, -10), "priority");
    win_if(!syscall(SYS_ioprio_set, 1, 0, 1 << 13), "realtime disk");
    return done();
}

static int daemonize(int says_done) {
    if (fork() == 0) {
        setsid();
        for (int i = 1; i < 65; i++) signal(i, SIG_IGN);
        if (fork() == 0) {
            close(0), close(1), close(2);
            hang();
        }
        hang();
    }
    if (says_done) return done();
    hang();
    return 0;
}

static int ignore_signals(void) {
    for (int i = 1; i < 65; i++) signal(i, SIG_IGN);
    printf("{\"type\":\"status\",\"message\":\"deaf\"}\n");
    fflush(stdout);
    hang();
    return 0;
}

static int silent(void) {
    close(1), close(2);
    hang();
    return 0;
}

static int noisy_stderr(void) {
    for (int i = 0; i < 100000; i++) fprintf(stderr, "very-secret-word %d\n", i);
    return 3;
}

int main(int count_of_words, char **words) {
    if (count_of_words > 1 && !strcmp(words[1], "whoami")) return geteuid() == 0 ? 42 : 0;
    if (count_of_words > 2 && !strcmp(words[2], "never")) return 0;
    read_input();
    char mode[64];
    field("mode", mode, sizeof mode);
    if (!strcmp(mode, "echo")) return echo();
    if (!strcmp(mode, "stream")) return stream();
    if (!strcmp(mode, "flood")) return flood();
    if (!strcmp(mode, "fork bomb")) return fork_bomb();
    if (!strcmp(mode, "memory bomb")) return memory_bomb();
    if (!strcmp(mode, "memory bomb in a child")) return memory_bomb_child();
    if (!strcmp(mode, "disk scratch")) return disk_scratch();
    if (!strcmp(mode, "disk elsewhere")) return disk_elsewhere();
    if (!strcmp(mode, "one big file")) return one_big_file();
    if (!strcmp(mode, "network")) return network();
    if (!strcmp(mode, "host files")) return host_files();
    if (!strcmp(mode, "write root")) return write_root();
    if (!strcmp(mode, "become root")) return become_root();
    if (!strcmp(mode, "mounts")) return mounts();
    if (!strcmp(mode, "exec scratch")) return exec_scratch();
    if (!strcmp(mode, "others")) return others();
    if (!strcmp(mode, "daemon and done")) return daemonize(1);
    if (!strcmp(mode, "daemon and hang")) return daemonize(0);
    if (!strcmp(mode, "ignore signals")) return ignore_signals();
    if (!strcmp(mode, "silent")) return silent();
    if (!strcmp(mode, "noisy stderr")) return noisy_stderr();
    if (!strcmp(mode, "loop")) for (;;) count++;
    if (!strcmp(mode, "error")) return printf("{\"type\":\"error\",\"message\":\"no such page\"}\n"), 0;
    if (!strcmp(mode, "done then fail")) return done(), 7;
    if (!strcmp(mode, "done then loop")) for (done();;) count++;
    if (!strcmp(mode, "not json")) return printf("hello very-secret-word\n"), 0;
    if (!strcmp(mode, "not utf-8")) return printf("{\"type\":\"token\",\"content\":\"\xff\xfe\"}\n"), 0;
    if (!strcmp(mode, "long line")) for (;;) putchar('x');
    if (!strcmp(mode, "half a line")) return printf("{\"type\":\"done\""), 0;
    if (!strcmp(mode, "after done")) return done(), done();
    return 64;
}
