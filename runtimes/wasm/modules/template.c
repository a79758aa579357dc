/* "template" filled with "data", in the manner of Mustache: {{name}} with HTML escaped, {{{name}}} or {{&name}} as it is, {{a.b}}, {{.}}
 * for the value itself, {{#name}}…{{/name}} for each entry of an array or once for anything but null, false and [], {{^name}}…{{/name}}
 * for those, {{! a comment }}. A tag of the last three kinds alone on its line takes the line away. With "strict" a name that "data"
 * does not have is an error, else it is empty. Partials and other delimiters are not known. */
#include "cargo.h"

typedef enum { TEXT, ESCAPED, RAW, SECTION, INVERTED } NodeKind;

typedef struct Node {
    NodeKind kind;
    const char *text; /* or the name */
    size_t size;
    struct Node *first, *next;
} Node;

static const char *begin, *at, *end;
static bool strict;
static const Json *stack[DEPTH_MAX + 1];
static int stack_size;

static void bad_template(const char *why, const char *name, size_t size) {
    int64_t line = 1;
    for (const char *p = begin; p < at && p < end; p++) line += *p == '\n';
    Buf b = {0};
    put_text(&b, "line ");
    put_int(&b, line);
    put_text(&b, " of \"template\": ");
    put(&b, name, size);
    put_text(&b, why);
    put_char(&b, 0);
    fail(b.at);
}

static Node *made(NodeKind kind, const char *text, size_t size) {
    Node *node = need(sizeof *node);
    *node = (Node){kind, text, size, NULL, NULL};
    return node;
}

static const char *find(const char *from, const char *mark) {
    size_t size = strlen(mark);
    for (; (size_t)(end - from) >= size; from++)
        if (!memcmp(from, mark, size)) return from;
    return NULL;
}

static bool is_blank(char c) { return c == ' ' || c == '\t'; }

/* Where the line of a tag begins and where the next one does, if nothing else stands on it. */
static bool is_alone(const char *first, const char *after, const char **line, const char **next) {
    while (first > begin && is_blank(first[-1])) first--;
    while (after < end && is_blank(*after)) after++;
    if (first > begin && first[-1] != '\n') return false;
    if (after + 1 < end && after[0] == '\r' && after[1] == '\n') after++;
    if (after < end && *after != '\n') return false;
    *line = first;
    *next = after < end ? after + 1 : after;
    return true;
}

typedef struct {
    char sign; /* # ^ / ! & { or 0 */
    const char *name, *first;
    size_t size;
} Tag;

/* The next tag; "at" is moved behind it, and the text before it becomes a node. False at the end. */
static bool next_tag(Tag *tag, Node ***tail) {
    const char *open = find(at, "{{"), *text = at, *text_end = open ? open : end, *next = end;
    if (open) {
        const char *from = open + 2;
        tag->sign = from < end && strchr("#^/!&{>=", *from) && *from ? *from++ : 0;
        const char *mark = tag->sign == '{' ? "}}}" : "}}", *close = find(from, mark);
        at = open;
        if (!close) bad_template("a tag has no end", "", 0);
        next = close + strlen(mark);
        while (from < close && (is_blank(*from) || *from == '\n')) from++;
        while (close > from && (is_blank(close[-1]) || close[-1] == '\n')) close--;
        tag->name = from;
        tag->size = (size_t)(close - from);
        if (tag->sign && strchr("#^/!", tag->sign)) is_alone(open, next, &text_end, &next);
    }
    if (text_end > text) {
        **tail = made(TEXT, text, (size_t)(text_end - text));
        *tail = &(**tail)->next;
    }
    at = next;
    return open != NULL;
}

/* Nodes up to the end of the section, or of the template where "section" is NULL. */
static Node *parsed(const Node *section, int depth) {
    Node *first = NULL, **tail = &first;
    Tag tag = {0};
    if (depth > DEPTH_MAX) bad_template("sections are nested too deeply", "", 0);
    while (next_tag(&tag, &tail)) {
        if (tag.sign == '!') continue;
        if (tag.sign == '>' || tag.sign == '=') bad_template("partials and other delimiters are not known", "", 0);
        if (!tag.size) bad_template("a tag has no name", "", 0);
        if (tag.sign == '/') {
            bool is_open = section && section->size == tag.size && !memcmp(section->text, tag.name, tag.size);
            if (!is_open) bad_template(" is closed and was not open", tag.name, tag.size);
            return first;
        }
        NodeKind kind = tag.sign == '#' ? SECTION : tag.sign == '^' ? INVERTED : tag.sign ? RAW : ESCAPED;
        Node *node = made(kind, tag.name, tag.size);
        *tail = node;
        tail = &node->next;
        if (kind == SECTION || kind == INVERTED) node->first = parsed(node, depth + 1);
    }
    if (section) bad_template(" is not closed", section->text, section->size);
    return first;
}

/* The first part of a dotted name is looked for from the innermost section outwards, the rest only below it. */
static const Json *looked_up(const char *name, size_t size) {
    const Json *value = NULL;
    if (size == 1 && *name == '.') return stack[stack_size - 1];
    for (size_t from = 0; from <= size;) {
        const char *dot = memchr(name + from, '.', size - from);
        size_t part = dot ? (size_t)(dot - name) - from : size - from;
        if (from == 0)
            for (int i = stack_size - 1; i >= 0 && !value; i--) value = json_get(stack[i], name, part);
        else
            value = json_get(value, name + from, part);
        if (!value) break;
        from += part + 1;
    }
    if (!value && strict) {
        Buf b = {0};
        put_text(&b, "\"data\" has no ");
        put(&b, name, size);
        put_char(&b, 0);
        fail(b.at);
    }
    return value;
}

static void put_escaped(Buf *b, const char *text, size_t size) {
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (c == '&') put_text(b, "&amp;");
        else if (c == '<') put_text(b, "&lt;");
        else if (c == '>') put_text(b, "&gt;");
        else if (c == '"') put_text(b, "&quot;");
        else put_char(b, c);
    }
}

static void put_value(Buf *b, const Json *value, bool escaped) {
    Buf text = {0};
    if (!value || value->kind == JSON_NULL) return;
    if (value->kind == JSON_STRING) put(&text, value->text, value->size);
    else put_json(&text, value);
    if (escaped) put_escaped(b, text.at, text.size);
    else put(b, text.at, text.size);
}

static void render(Buf *b, const Node *node);

static void render_with(Buf *b, const Node *section, const Json *value) {
    stack[stack_size++] = value; /* sections are no deeper than DEPTH_MAX */
    render(b, section->first);
    stack_size--;
}

static void render_section(Buf *b, const Node *section, const Json *value) {
    bool is_empty = !value || value->kind == JSON_NULL || value->kind == JSON_FALSE || (value->kind == JSON_ARRAY && !value->size);
    if (section->kind == INVERTED) {
        if (is_empty) render(b, section->first);
    } else if (!is_empty && value->kind == JSON_ARRAY) {
        for (const Json *child = value->first; child; child = child->next) render_with(b, section, child);
    } else if (!is_empty) {
        render_with(b, section, value);
    }
}

static void render(Buf *b, const Node *node) {
    for (; node; node = node->next) {
        if (node->kind == TEXT) put(b, node->text, node->size);
        else if (node->kind >= SECTION) render_section(b, node, looked_up(node->text, node->size));
        else put_value(b, looked_up(node->text, node->size), node->kind == ESCAPED);
    }
}

int main(void) {
    const Json *in = input(), *template = need_string(in, "template"), *data = json_get(in, "data", 4);
    if (!data) fail("the input needs \"data\"");
    strict = bool_or(in, "strict", false);
    begin = at = template->text;
    end = at + template->size;
    Node *nodes = parsed(NULL, 0);
    stack[stack_size++] = data;
    Buf text = {0}, out = done_begin();
    render(&text, nodes);
    done_string(&out, "text", text.at, text.size);
    return done_end(&out);
}
