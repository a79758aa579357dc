/* The shortest edit from the lines of "old" to those of "new" (Myers), as text: each line after a blank, - or +, and its counts. "context":
 * how many equal lines are kept around each change, with a line "..." for the rest (default: all of them). */
#include "cargo.h"

#define LINES_MAX 20000
#define EDITS_MAX 4000

typedef struct {
    const char *at;
    size_t size;
} Row;
typedef struct {
    char mark;
    Row row;
} Edit;

static size_t split(const Json *text, Row *rows) {
    size_t count = 0;
    const char *p = text->text, *end = p + text->size;
    while (p < end) {
        const char *stop = memchr(p, '\n', end - p);
        if (!stop) stop = end;
        if (count == LINES_MAX) fail("a text has more than 20000 lines");
        rows[count++] = (Row){p, stop - p};
        p = stop + 1;
    }
    return count;
}

static Row olds[LINES_MAX], news[LINES_MAX];
static int *history[EDITS_MAX + 1];

static bool same(int x, int y) { return olds[x].size == news[y].size && !memcmp(olds[x].at, news[y].at, olds[x].size); }

/* history[d][k + d]: how far the path on diagonal k has come after d edits. Returns the number of edits. */
static int search(int n, int m) {
    for (int d = 0; d <= EDITS_MAX; d++) {
        history[d] = need((2 * d + 1) * sizeof(int));
        const int *last = d ? history[d - 1] + d - 1 : NULL;
        for (int k = -d; k <= d; k += 2) {
            int x = !d ? 0 : k == -d || (k != d && last[k - 1] < last[k + 1]) ? last[k + 1] : last[k - 1] + 1;
            while (x < n && x - k < m && same(x, x - k)) x++;
            history[d][k + d] = x;
            if (x >= n && x - k >= m) return d;
        }
    }
    fail("the texts differ in more than 4000 lines");
    return 0;
}

static size_t trace(int d, int n, int m, Edit *edits) {
    size_t at = n + m;
    for (int x = n, y = m; d >= 0; d--) {
        int k = x - y, from = 0, from_y = 0;
        bool down = false;
        if (d) {
            const int *last = history[d - 1] + d - 1;
            down = k == -d || (k != d && last[k - 1] < last[k + 1]);
            from = down ? last[k + 1] : last[k - 1];
            from_y = from - (down ? k + 1 : k - 1);
        }
        int start = d ? (down ? from : from + 1) : 0;
        while (x > start) {
            edits[--at] = (Edit){' ', olds[--x]};
            y--;
        }
        if (d) edits[--at] = down ? (Edit){'+', news[from_y]} : (Edit){'-', olds[from]};
        x = from;
        y = from_y;
    }
    return at;
}

int main(void) {
    const Json *in = input();
    int n = (int)split(need_string(in, "old"), olds), m = (int)split(need_string(in, "new"), news);
    int64_t context = int_or(in, "context", LINES_MAX, 0, LINES_MAX), added = 0, removed = 0;
    Edit *edits = need((n + m) * sizeof *edits);
    size_t first = trace(search(n, m), n, m, edits), count = n + m;
    char *kept = need(count);
    memset(kept, context == LINES_MAX, count);
    for (size_t i = first; i < count; i++) {
        if (edits[i].mark == ' ') continue;
        added += edits[i].mark == '+';
        removed += edits[i].mark == '-';
        for (int64_t j = -context; j <= context; j++)
            if ((int64_t)i + j >= (int64_t)first && (int64_t)i + j < (int64_t)count) kept[i + j] = 1;
    }
    Buf text = {0}, out = done_begin();
    for (size_t i = first; i < count; i++) {
        if (kept[i]) {
            put_char(&text, edits[i].mark);
            put(&text, edits[i].row.at, edits[i].row.size);
            put_char(&text, '\n');
        } else if (added + removed && (i == first || kept[i - 1])) {
            put_text(&text, "...\n");
        }
    }
    done_string(&out, "diff", text.at, text.size);
    done_int(&out, "added", added);
    done_int(&out, "removed", removed);
    return done_end(&out);
}
