/* How often each word of "text" comes, the most frequent first ("top", default 10), equal ones in the order of their bytes. Words shorter
 * than "min_length" characters are left out; ASCII letters count in any case. */
#include "cargo.h"

typedef struct {
    const char *at;
    size_t size, count;
} Word;

static int by_text(const void *a, const void *b) {
    const Word *x = a, *y = b;
    int difference = memcmp(x->at, y->at, x->size < y->size ? x->size : y->size);
    return difference ? difference : x->size < y->size ? -1 : x->size > y->size;
}

static int by_count(const void *a, const void *b) {
    const Word *x = a, *y = b;
    return x->count != y->count ? (x->count < y->count ? 1 : -1) : by_text(a, b);
}

int main(void) {
    const Json *in = input(), *text = need_string(in, "text");
    int64_t top = int_or(in, "top", 10, 1, 10000), least = int_or(in, "min_length", 1, 1, 1000);
    char *p = need(text->size);
    size_t size = text->size, words = 0, different = 0;
    for (size_t i = 0; i < size; i++) p[i] = lower(text->text[i]);
    Word *list = need((size / 2 + 1) * sizeof *list);
    for (size_t i = 0; i < size; i++) {
        if (!is_word_byte(p[i])) continue;
        size_t first = i;
        while (i < size && is_word_byte(p[i])) i++;
        if ((int64_t)utf8_length(p + first, i - first) >= least) list[words++] = (Word){p + first, i - first, 1};
    }
    qsort(list, words, sizeof *list, by_text);
    for (size_t i = 0; i < words; i++) {
        if (different && !by_text(list + different - 1, list + i)) list[different - 1].count++;
        else list[different++] = list[i];
    }
    qsort(list, different, sizeof *list, by_count);
    Buf out = done_begin();
    done_key(&out, "words");
    put_char(&out, '[');
    for (size_t i = 0; i < different && (int64_t)i < top; i++) {
        put_text(&out, i ? ",{\"word\":" : "{\"word\":");
        put_string(&out, list[i].at, list[i].size);
        put_text(&out, ",\"count\":");
        put_int(&out, (int64_t)list[i].count);
        put_char(&out, '}');
    }
    put_char(&out, ']');
    done_int(&out, "total", (int64_t)words);
    done_int(&out, "different", (int64_t)different);
    return done_end(&out);
}
