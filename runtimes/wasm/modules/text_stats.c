/* Counts of "text": bytes, characters, words, different words (ASCII letters in any case), lines, sentences, paragraphs, mean length of a
 * word, and minutes to read at 230 words a minute. */
#include "cargo.h"

typedef struct {
    const char *at;
    size_t size;
} Word;

static int compare(const void *a, const void *b) {
    const Word *x = a, *y = b;
    size_t size = x->size < y->size ? x->size : y->size;
    for (size_t i = 0; i < size; i++) {
        int difference = (unsigned char)lower(x->at[i]) - (unsigned char)lower(y->at[i]);
        if (difference) return difference;
    }
    return x->size < y->size ? -1 : x->size > y->size;
}

int main(void) {
    const Json *text = need_string(input(), "text");
    const char *p = text->text;
    size_t size = text->size, words = 0, letters = 0, lines = 0, sentences = 0, paragraphs = 0, different = 0;
    Word *list = need((size / 2 + 1) * sizeof *list);
    bool in_sentence = false, in_paragraph = false, blank = true;
    for (size_t i = 0; i < size;) {
        if (is_word_byte(p[i])) {
            size_t first = i;
            while (i < size && is_word_byte(p[i])) i++;
            list[words++] = (Word){p + first, i - first};
            letters += utf8_length(p + first, i - first);
            paragraphs += !in_paragraph;
            in_sentence = in_paragraph = true;
            blank = false;
            continue;
        }
        char c = p[i++];
        if ((c == '.' || c == '!' || c == '?') && in_sentence && (i == size || p[i] == ' ' || p[i] == '\n' || p[i] == '"')) {
            sentences++;
            in_sentence = false;
        }
        if (c == '\n') {
            lines++;
            if (blank) in_paragraph = false;
            blank = true;
        } else if (c != ' ' && c != '\t' && c != '\r') {
            blank = false;
        }
    }
    lines += size && p[size - 1] != '\n';
    sentences += in_sentence;
    qsort(list, words, sizeof *list, compare);
    for (size_t i = 0; i < words; i++) different += i == 0 || compare(list + i - 1, list + i) != 0;
    Buf out = done_begin();
    done_int(&out, "bytes", (int64_t)size);
    done_int(&out, "characters", (int64_t)utf8_length(p, size));
    done_int(&out, "words", (int64_t)words);
    done_int(&out, "different_words", (int64_t)different);
    done_int(&out, "lines", (int64_t)lines);
    done_int(&out, "sentences", (int64_t)sentences);
    done_int(&out, "paragraphs", (int64_t)paragraphs);
    done_key(&out, "mean_word_length");
    put_thousandths(&out, words ? (int64_t)((1000 * letters + words / 2) / words) : 0);
    done_key(&out, "reading_minutes");
    put_thousandths(&out, (int64_t)((1000 * words + 115) / 230));
    return done_end(&out);
}
