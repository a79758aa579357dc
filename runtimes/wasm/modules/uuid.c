/* "count" (default 1) random UUIDs, version 4 (RFC 9562). Chance comes from the seed of the job, so equal jobs give equal ones. */
#include "cargo.h"

int main(void) {
    const Json *in = input();
    int64_t count = int_or(in, "count", 1, 1, 10000);
    Buf out = done_begin();
    done_key(&out, "uuids");
    put_char(&out, '[');
    for (int64_t i = 0; i < count; i++) {
        uint8_t b[16];
        if (getentropy(b, sizeof b)) fail("there is no chance to be had");
        b[6] = 0x40 | (b[6] & 15);
        b[8] = 0x80 | (b[8] & 63);
        put_text(&out, i ? ",\"" : "\"");
        for (int part = 0, at = 0; part < 5; part++) {
            static const int sizes[] = {4, 2, 2, 2, 6};
            if (part) put_char(&out, '-');
            put_hex(&out, b + at, sizes[part]);
            at += sizes[part];
        }
        put_char(&out, '"');
    }
    put_char(&out, ']');
    return done_end(&out);
}
