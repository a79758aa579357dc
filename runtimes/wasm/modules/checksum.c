/* CRC-32 (as in zip and PNG), Adler-32 and 64-bit FNV-1a of "text" or "base64", in hexadecimal. For mistakes, not for malice. */
#include "cargo.h"

static void done_hex(Buf *out, const char *key, uint64_t value, int digits) {
    Buf hex = {0};
    for (int i = digits - 1; i >= 0; i--) put_char(&hex, "0123456789abcdef"[value >> 4 * i & 15]);
    done_string(out, key, hex.at, hex.size);
}

int main(void) {
    Buf data = input_bytes(input()), out = done_begin();
    uint32_t table[256], crc = ~0u, a = 1, b = 0;
    uint64_t fnv = 0xcbf29ce484222325;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int k = 0; k < 8; k++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320 : 0);
    }
    for (size_t i = 0; i < data.size; i++) {
        uint8_t c = (uint8_t)data.at[i];
        crc = table[(crc ^ c) & 255] ^ crc >> 8;
        a = (a + c) % 65521;
        b = (b + a) % 65521;
        fnv = (fnv ^ c) * 0x100000001b3;
    }
    done_hex(&out, "crc32", ~crc, 8);
    done_hex(&out, "adler32", b << 16 | a, 8);
    done_hex(&out, "fnv1a64", fnv, 16);
    done_int(&out, "bytes", (int64_t)data.size);
    return done_end(&out);
}
