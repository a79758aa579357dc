/* BLAKE2b (RFC 7693) of "text" or "base64", with "size" bytes (1 to 64, default 64) and an optional "key" (text, at most 64 bytes). */
#include "cargo.h"

static const uint64_t start[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
static const uint8_t order[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

static uint64_t turn(uint64_t x, int n) { return x >> n | x << (64 - n); }

static void mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x;
    v[d] = turn(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = turn(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = turn(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = turn(v[b] ^ v[c], 63);
}

static void block(uint64_t *h, const uint8_t *data, uint64_t count, bool is_last) {
    uint64_t v[16], m[16];
    memcpy(m, data, 128); /* WebAssembly is little-endian, as BLAKE2 is */
    memcpy(v, h, 64);
    memcpy(v + 8, start, 64);
    v[12] ^= count;
    if (is_last) v[14] = ~v[14];
    for (int round = 0; round < 12; round++) {
        const uint8_t *s = order[round % 10];
        for (int i = 0; i < 4; i++) mix(v, i, i + 4, i + 8, i + 12, m[s[2 * i]], m[s[2 * i + 1]]);
        for (int i = 0; i < 4; i++) mix(v, i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[s[2 * i + 8]], m[s[2 * i + 9]]);
    }
    for (int i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
}

int main(void) {
    const Json *in = input();
    Buf data = input_bytes(in), whole = {0};
    size_t size = (size_t)int_or(in, "size", 64, 1, 64), key_size = 0;
    if (field(in, "key")) {
        const Json *key = need_string(in, "key");
        key_size = key->size;
        if (key_size > 64) bad_field("key", "at most 64 bytes");
        memset(buf_grow(&whole, key_size ? 128 : 0), 0, key_size ? 128 : 0);
        memcpy(whole.at, key->text, key_size);
    }
    put(&whole, data.at, data.size);
    size_t total = whole.size, padded = total ? (total + 127) / 128 * 128 : 128;
    memset(buf_grow(&whole, padded - total), 0, padded - total);
    uint64_t h[8];
    memcpy(h, start, 64);
    h[0] ^= 0x01010000 ^ key_size << 8 ^ size;
    for (size_t at = 0; at < padded; at += 128) {
        bool is_last = at + 128 == padded;
        block(h, (uint8_t *)whole.at + at, is_last ? total : at + 128, is_last);
    }
    Buf hex = {0}, out = done_begin();
    put_hex(&hex, (uint8_t *)h, size);
    done_string(&out, "blake2b", hex.at, hex.size);
    done_int(&out, "bytes", (int64_t)data.size);
    return done_end(&out);
}
