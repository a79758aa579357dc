/* The parts of "url" (RFC 3986): scheme, user, host, port, path, query, fragment; the query's fields in order, with %XX and + decoded. */
#include "cargo.h"

static int hex_digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

/* Decodes %XX of ASCII, and of whole UTF-8 where the result is JSON text all the same; a lone byte stays as it was written. */
static void put_decoded(Buf *b, const char *p, size_t size) {
    Buf text = {0};
    for (size_t i = 0; i < size; i++) {
        if (p[i] == '%' && i + 2 < size + 0 && hex_digit(p[i + 1]) >= 0 && hex_digit(p[i + 2]) >= 0) {
            int value = hex_digit(p[i + 1]) << 4 | hex_digit(p[i + 2]);
            int more = value < 0x80 ? 0 : value >= 0xC2 && value < 0xE0 ? 1 : value >= 0xE0 && value < 0xF0 ? 2 : value >= 0xF0 && value < 0xF4 ? 3 : -1;
            char bytes[4] = {(char)value};
            bool good = more >= 0 && i + 3 * (size_t)(more + 1) <= size;
            for (int k = 1; good && k <= more; k++) {
                const char *at = p + i + 3 * k;
                int next = at[0] == '%' && hex_digit(at[1]) >= 0 && hex_digit(at[2]) >= 0 ? hex_digit(at[1]) << 4 | hex_digit(at[2]) : 0;
                good = (next & 0xC0) == 0x80 && !(k == 1 && ((value == 0xE0 && next < 0xA0) || (value == 0xED && next > 0x9F) || (value == 0xF0 && next < 0x90)));
                bytes[k] = (char)next;
            }
            if (good) {
                put(&text, bytes, (size_t)more + 1);
                i += 3 * (size_t)(more + 1) - 1;
                continue;
            }
        }
        put_char(&text, p[i] == '+' ? ' ' : p[i]);
    }
    put_string(b, text.at, text.size);
}

static const char *find(const char *p, const char *end, const char *any) {
    while (p < end && !strchr(any, *p)) p++;
    return p;
}

static void put_fields(Buf *out, const char *p, const char *end) {
    done_key(out, "fields");
    put_char(out, '[');
    for (bool first = true; p < end; first = false) {
        const char *next = find(p, end, "&"), *equals = find(p, next, "=");
        put_text(out, first ? "[" : ",[");
        put_decoded(out, p, equals - p);
        put_char(out, ',');
        put_decoded(out, equals + (equals < next), next - equals - (equals < next));
        put_char(out, ']');
        p = next + 1;
    }
    put_char(out, ']');
}

static void put_authority(Buf *out, const char *p, const char *end) {
    const char *at = end;
    while (at > p && at[-1] != '@') at--;
    if (at > p) done_string(out, "user", p, at - 1 - p);
    const char *host_end = *at == '[' ? find(at, end, "]") : find(at, end, ":");
    if (*at == '[' && host_end++ == end) fail("the address in brackets has no end");
    Buf host = {0};
    for (const char *c = at; c < host_end; c++) put_char(&host, lower(*c));
    done_string(out, "host", host.at, host.size);
    if (host_end == end) return;
    if (*host_end++ != ':') fail("something is between the host and the path");
    int64_t port = 0;
    for (const char *c = host_end; c < end; c++) {
        if (*c < '0' || *c > '9' || (port = 10 * port + *c - '0') > 65535) fail("the port is no number up to 65535");
    }
    if (host_end < end) done_int(out, "port", port);
}

int main(void) {
    const Json *url = need_string(input(), "url");
    const char *p = url->text, *end = p + url->size, *colon = find(p, end, ":/?#");
    Buf out = done_begin(), scheme = {0};
    for (const char *c = p; c < end; c++)
        if ((unsigned char)*c <= ' ' || *c == '<' || *c == '>' || *c == '"') fail("a URL has no blanks, quotes or control characters");
    if (colon < end && *colon == ':' && colon > p) {
        for (; p < colon; p++) put_char(&scheme, lower(*p));
        p++;
    }
    done_string(&out, "scheme", scheme.at, scheme.size);
    if (end - p >= 2 && p[0] == '/' && p[1] == '/') {
        const char *stop = find(p + 2, end, "/?#");
        put_authority(&out, p + 2, stop);
        p = stop;
    }
    const char *path_end = find(p, end, "?#"), *query_end = find(path_end, end, "#");
    done_string(&out, "path", p, path_end - p);
    const char *query = path_end + (path_end < query_end);
    done_string(&out, "query", query, query_end - query);
    put_fields(&out, query, query_end);
    const char *fragment = query_end + (query_end < end);
    done_string(&out, "fragment", fragment, end - fragment);
    return done_end(&out);
}
