/* Levenshtein's distance between "a" and "b" in characters, and how alike they are, from 0 to 1. Each at most 20,000 characters. */
#include "cargo.h"

#define CHARACTERS_MAX 20000

static size_t characters(const Json *text, uint32_t *out) {
    size_t count = 0;
    for (size_t i = 0; i < text->size;) {
        uint8_t c = (uint8_t)text->text[i++];
        uint32_t value = c < 0x80 ? c : c < 0xE0 ? c & 31 : c < 0xF0 ? c & 15 : c & 7;
        while (i < text->size && (text->text[i] & 0xC0) == 0x80) value = value << 6 | (text->text[i++] & 63);
        if (count == CHARACTERS_MAX) fail("a text has more than 20000 characters");
        out[count++] = value;
    }
    return count;
}

static uint32_t a[CHARACTERS_MAX], b[CHARACTERS_MAX], row[CHARACTERS_MAX + 1];

int main(void) {
    const Json *in = input();
    size_t m = characters(need_string(in, "a"), a), n = characters(need_string(in, "b"), b), longer = m > n ? m : n;
    for (size_t j = 0; j <= n; j++) row[j] = (uint32_t)j;
    for (size_t i = 1; i <= m; i++) {
        uint32_t corner = row[0];
        row[0] = (uint32_t)i;
        for (size_t j = 1; j <= n; j++) {
            uint32_t replaced = corner + (a[i - 1] != b[j - 1]);
            corner = row[j];
            uint32_t least = row[j] < row[j - 1] ? row[j] : row[j - 1];
            row[j] = least + 1 < replaced ? least + 1 : replaced;
        }
    }
    Buf out = done_begin();
    done_int(&out, "distance", row[n]);
    done_key(&out, "similarity");
    put_thousandths(&out, longer ? (int64_t)((longer - row[n]) * 1000 / longer) : 1000);
    return done_end(&out);
}
