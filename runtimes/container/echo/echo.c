/* A container's whole program: the input's JSON comes back on a done line, after a status line. No C library: system calls of Linux on
 * x86-64, so that the image is this file alone. Exit status 1 where the input is larger than its room. */
typedef unsigned long size;

static long call(long number, long a, const void *b, size c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

enum { READ = 0, WRITE = 1, EXIT_GROUP = 231 };

static char room[2 * 1024 * 1024];

static void leave(int status) {
    for (;;) call(EXIT_GROUP, status, 0, 0);
}

static void say(const char *text, size length) {
    for (size done = 0; done < length;) {
        long written = call(WRITE, 1, text + done, length - done);
        if (written <= 0) leave(2);
        done += (size)written;
    }
}

#define SAY(text) say(text, sizeof text - 1)

__attribute__((force_align_arg_pointer, noreturn)) void _start(void) {
    size length = 0;
    SAY("{\"type\":\"status\",\"message\":\"reading\"}\n");
    for (long count; (count = call(READ, 0, room + length, sizeof room - length)) > 0;) length += (size)count;
    if (length == sizeof room) leave(1);
    for (size i = 0; i < length; i++)
        if (room[i] == '\n' || room[i] == '\r') room[i] = ' '; /* JSON has them between values only, and a line ends at the first */
    SAY("{\"type\":\"done\",\"input\":");
    say(room, length);
    SAY("}\n");
    leave(0);
    __builtin_unreachable();
}
