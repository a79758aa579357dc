/* "markdown" to HTML: headings, paragraphs, emphasis, code, fenced code, links, pictures, lists, quotes, rules. HTML in the source is
 * escaped, and links lead to http, https, mailto or relative addresses only, so that the result may be shown. */
#include "cargo.h"

static void escape(Buf *b, const char *p, size_t size) {
    for (size_t i = 0; i < size; i++) {
        if (p[i] == '&') put_text(b, "&amp;");
        else if (p[i] == '<') put_text(b, "&lt;");
        else if (p[i] == '>') put_text(b, "&gt;");
        else if (p[i] == '"') put_text(b, "&quot;");
        else put_char(b, p[i]);
    }
}

static const char *find(const char *p, const char *end, const char *what) {
    size_t size = strlen(what);
    for (; p + size <= end; p++)
        if (!memcmp(p, what, size)) return p;
    return NULL;
}

static bool safe_address(const char *p, size_t size) {
    static const char *const good[] = {"http:", "https:", "mailto:"};
    for (size_t i = 0; i < size; i++) {
        if ((unsigned char)p[i] <= ' ') return false;
        if (p[i] == '/' || p[i] == '?' || p[i] == '#') return true;
        if (p[i] != ':') continue;
        for (int k = 0; k < 3; k++) {
            bool same = strlen(good[k]) == i + 1;
            for (size_t j = 0; same && j <= i; j++) same = lower(p[j]) == good[k][j];
            if (same) return true;
        }
        return false;
    }
    return true;
}

static void spans(Buf *b, const char *p, const char *end, int depth);

/* [text](address) or ![text](address); returns what follows, or NULL where it is none. */
static const char *put_link(Buf *b, const char *p, const char *end, int depth) {
    bool picture = *p == '!';
    const char *text = p + 1 + picture, *close = find(text, end, "]("), *stop = close ? find(close, end, ")") : NULL;
    if (!stop || memchr(text, '[', close - text)) return NULL;
    const char *address = close + 2;
    if (!safe_address(address, stop - address)) return NULL;
    put_text(b, picture ? "<img src=\"" : "<a href=\"");
    escape(b, address, stop - address);
    if (picture) {
        put_text(b, "\" alt=\"");
        escape(b, text, close - text);
        put_text(b, "\">");
    } else {
        put_text(b, "\">");
        spans(b, text, close, depth + 1);
        put_text(b, "</a>");
    }
    return stop + 1;
}

static const char *pair(Buf *b, const char *p, const char *end, const char *mark, const char *tag, int depth) {
    size_t size = strlen(mark);
    if ((size_t)(end - p) < size || memcmp(p, mark, size) || p + size == end || p[size] == ' ') return NULL;
    const char *stop = find(p + size, end, mark);
    while (stop && stop[-1] == ' ') stop = find(stop + 1, end, mark);
    if (!stop || stop == p + size) return NULL;
    put_char(b, '<');
    put_text(b, tag);
    put_char(b, '>');
    if (*mark == '`') escape(b, p + size, stop - p - size);
    else spans(b, p + size, stop, depth + 1);
    put_text(b, "</");
    put_text(b, tag);
    put_char(b, '>');
    return stop + size;
}

static void spans(Buf *b, const char *p, const char *end, int depth) {
    while (p < end) {
        const char *next = NULL;
        if (*p == '\\' && p + 1 < end && strchr("\\`*_[]()#!~-", p[1])) {
            escape(b, p + 1, 1);
            p += 2;
            continue;
        }
        if (depth < 16) {
            if (*p == '`') next = pair(b, p, end, "`", "code", depth);
            else if (*p == '[' || (*p == '!' && p + 1 < end && p[1] == '[')) next = put_link(b, p, end, depth);
            else if (*p == '*' && !(next = pair(b, p, end, "**", "strong", depth))) next = pair(b, p, end, "*", "em", depth);
            else if (*p == '_' && !next) next = pair(b, p, end, "_", "em", depth);
            else if (*p == '~') next = pair(b, p, end, "~~", "del", depth);
        }
        if (!next) escape(b, p, 1), next = p + 1;
        p = next;
    }
}

typedef enum { NONE, PARAGRAPH, BULLETS, NUMBERS, QUOTE } Block;
static const char *const opens[] = {"", "<p>", "<ul>\n", "<ol>\n", "<blockquote><p>"};
static const char *const closes[] = {"", "</p>\n", "</ul>\n", "</ol>\n", "</p></blockquote>\n"};
static Block block;
static Buf html;

static void enter(Block next) {
    if (next == block) return;
    put_text(&html, closes[block]);
    put_text(&html, opens[next]);
    block = next;
}

static bool is_rule(const char *p, const char *end) {
    int count = 0;
    for (char c = *p; p < end; p++) {
        if (*p == c) count++;
        else if (*p != ' ') return false;
    }
    return count >= 3;
}

static void item(const char *p, const char *end, Block kind) {
    enter(kind);
    put_text(&html, "<li>");
    spans(&html, p, end, 0);
    put_text(&html, "</li>\n");
}

static void heading(const char *p, const char *end, int level) {
    char tag[] = "<h1>";
    tag[2] = (char)('0' + level);
    enter(NONE);
    put_text(&html, tag);
    while (end > p && (end[-1] == '#' || end[-1] == ' ')) end--;
    spans(&html, p, end, 0);
    put_text(&html, "</");
    put_text(&html, tag + 1);
    put_char(&html, '\n');
}

static void text_line(const char *p, const char *end, Block kind) {
    bool goes_on = block == kind;
    enter(kind);
    if (goes_on) put_char(&html, '\n');
    spans(&html, p, end, 0);
}

static void line(const char *p, const char *end) {
    while (end > p && (end[-1] == ' ' || end[-1] == '\r')) end--;
    int indent = 0, level = 0;
    while (p < end && *p == ' ') p++, indent++;
    if (p == end) {
        enter(NONE);
        return;
    }
    while (p + level < end && p[level] == '#') level++;
    const char *digits = p;
    while (digits < end && *digits >= '0' && *digits <= '9') digits++;
    if (level >= 1 && level <= 6 && p + level < end && p[level] == ' ') {
        heading(p + level + 1, end, level);
    } else if (strchr("-*_", *p) && is_rule(p, end)) {
        enter(NONE);
        put_text(&html, "<hr>\n");
    } else if (strchr("-*+", *p) && p + 1 < end && p[1] == ' ') {
        item(p + 2, end, BULLETS);
    } else if (digits > p && digits + 1 < end && digits[0] == '.' && digits[1] == ' ') {
        item(digits + 2, end, NUMBERS);
    } else if (*p == '>') {
        text_line(p + 1 + (p + 1 < end && p[1] == ' '), end, QUOTE);
    } else {
        text_line(p, end, PARAGRAPH);
    }
}

int main(void) {
    const Json *source = need_string(input(), "markdown");
    const char *p = source->text, *end = p + source->size;
    bool fenced = false;
    while (p < end) {
        const char *stop = memchr(p, '\n', end - p);
        if (!stop) stop = end;
        if (stop - p >= 3 && !memcmp(p, "```", 3)) {
            enter(NONE);
            put_text(&html, fenced ? "</code></pre>\n" : "<pre><code>");
            fenced = !fenced;
        } else if (fenced) {
            escape(&html, p, stop - p);
            put_char(&html, '\n');
        } else {
            line(p, stop);
        }
        p = stop + 1;
    }
    enter(NONE);
    if (fenced) put_text(&html, "</code></pre>\n");
    Buf out = done_begin();
    done_string(&out, "html", html.at, html.size);
    return done_end(&out);
}
