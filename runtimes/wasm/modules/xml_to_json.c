/* "xml" as JSON: an element is {"name", "attributes", "children"}, its children are texts and elements in order. XML 1.0 as it is
 * written, names with their prefixes; texts of white space alone are left out unless "space" is true. References are those to characters
 * and &lt; &gt; &amp; &quot; &apos;. A DOCTYPE is refused, so that nothing can be declared and nothing grows; comments and instructions
 * are left out. */
#include "cargo.h"

#define ELEMENTS_DEEP_MAX 100

static const char *at, *end, *begin;
static bool keep_space;
static int64_t elements;

static void bad_xml(const char *why) {
    int64_t line = 1;
    for (const char *p = begin; p < at && p < end; p++) line += *p == '\n';
    Buf b = {0};
    put_text(&b, "line ");
    put_int(&b, line);
    put_text(&b, ": ");
    put_text(&b, why);
    put_char(&b, 0);
    fail(b.at);
}

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

static bool skip_space(void) {
    const char *first = at;
    while (at < end && is_space(*at)) at++;
    return at > first;
}

static bool ahead(const char *text) {
    size_t size = strlen(text);
    return (size_t)(end - at) >= size && !memcmp(at, text, size);
}

static bool take(const char *text) {
    if (!ahead(text)) return false;
    at += strlen(text);
    return true;
}

/* Beyond ASCII every character may stand in a name. */
static bool is_name(unsigned char c, bool first) {
    if (c >= 0x80 || c == '_' || c == ':' || ((c | 32) >= 'a' && (c | 32) <= 'z')) return true;
    return !first && ((c >= '0' && c <= '9') || c == '-' || c == '.');
}

static Buf read_name(void) {
    const char *first = at;
    if (at == end || !is_name((unsigned char)*at, true)) bad_xml("a name is missing");
    while (at < end && is_name((unsigned char)*at, false)) at++;
    return (Buf){(char *)first, (size_t)(at - first), 0};
}

static bool is_character(uint32_t c) {
    return c == 9 || c == 10 || c == 13 || (c >= 32 && c < 0xD800) || (c >= 0xE000 && c <= 0x10FFFF && c != 0xFFFE && c != 0xFFFF);
}

static void read_number(Buf *b) {
    bool hex = take("x");
    uint32_t value = 0;
    const char *first = at;
    for (; at < end && *at != ';'; at++) {
        char c = *at;
        int digit = c >= '0' && c <= '9' ? c - '0' : hex && (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 99;
        if (digit == 99 || value > 0x10FFFF) bad_xml("&# is followed by no number of a character");
        value = value * (hex ? 16 : 10) + (uint32_t)digit;
    }
    if (at == first || !take(";") || !is_character(value)) bad_xml("&# is followed by no number of a character");
    put_utf8(b, value);
}

static void read_reference(Buf *b) {
    static const char *const known[] = {"lt;", "<", "gt;", ">", "amp;", "&", "quot;", "\"", "apos;", "'"};
    at++;
    if (take("#")) {
        read_number(b);
        return;
    }
    for (int i = 0; i < 10; i += 2) {
        if (!take(known[i])) continue;
        put_text(b, known[i + 1]);
        return;
    }
    bad_xml("& must be followed by lt; gt; amp; quot; apos; or # and a number");
}

/* One character of data as it is; line ends become one \n. */
static void read_plain(Buf *b) {
    unsigned char c = (unsigned char)*at;
    if (c < 32 && !is_space((char)c)) bad_xml("a control character is not allowed");
    at++;
    if (c == '\r' && at < end && *at == '\n') return;
    put_char(b, c == '\r' ? '\n' : (char)c);
}

/* From behind "<!--", "<?…" or "<![CDATA[" to behind the mark; what is between is put into "b". */
static void read_until(const char *mark, Buf *b) {
    while (!ahead(mark)) {
        if (at == end) bad_xml("a comment, an instruction or CDATA has no end");
        read_plain(b);
    }
    at += strlen(mark);
}

static void skip_comment(void) {
    Buf b = {0};
    read_until("--", &b);
    if (!take(">")) bad_xml("-- stands within a comment");
}

static void skip_instruction(void) {
    Buf b = {0}, target = read_name();
    bool is_xml = target.size == 3 && lower(target.at[0]) == 'x' && lower(target.at[1]) == 'm' && lower(target.at[2]) == 'l';
    if (is_xml) bad_xml("<?xml stands at the very beginning only");
    if (!ahead("?>") && !skip_space()) bad_xml("an instruction's name has no end");
    read_until("?>", &b);
}

/* Comments, instructions and white space around the outermost element. */
static void skip_misc(void) {
    for (;;) {
        skip_space();
        if (take("<!--")) skip_comment();
        else if (take("<?")) skip_instruction();
        else if (ahead("<!DOCTYPE")) bad_xml("a DOCTYPE is not allowed");
        else return;
    }
}

static void read_attribute(Buf *b, Buf *seen) {
    Buf name = read_name(), value = {0};
    for (const char *p = seen->at; p && p < seen->at + seen->size; p += strlen(p) + 1)
        if (strlen(p) == name.size && !memcmp(p, name.at, name.size)) bad_xml("an attribute stands twice");
    put(seen, name.at, name.size);
    put_char(seen, 0);
    skip_space();
    if (!take("=")) bad_xml("an attribute has no =");
    skip_space();
    char quote = at < end ? *at : 0;
    if (quote != '"' && quote != '\'') bad_xml("an attribute's value stands in quotes");
    at++;
    while (at < end && *at != quote) {
        if (*at == '<') bad_xml("< stands in an attribute");
        if (*at == '&') {
            read_reference(&value);
            continue;
        }
        size_t before = value.size;
        read_plain(&value);
        if (value.size > before && is_space(value.at[before])) value.at[before] = ' ';
    }
    if (!take(quote == '"' ? "\"" : "'")) bad_xml("an attribute's value has no end");
    put_string(b, name.at, name.size);
    put_char(b, ':');
    put_string(b, value.at, value.size);
}

static void put_text_child(Buf *b, Buf *text, bool *has_children) {
    size_t spaces = 0;
    while (spaces < text->size && is_space(text->at[spaces])) spaces++;
    if (text->size && (keep_space || spaces < text->size)) {
        if (*has_children) put_char(b, ',');
        put_string(b, text->at, text->size);
        *has_children = true;
    }
    text->size = 0;
}

static void read_element(Buf *b, int depth);

static void read_children(Buf *b, Buf name, int depth) {
    Buf text = {0};
    bool has_children = false;
    for (;;) {
        if (at == end) bad_xml("an element has no end");
        if (ahead("]]>")) bad_xml("]]> stands in a text");
        if (*at == '&') {
            read_reference(&text);
        } else if (*at != '<') {
            read_plain(&text);
        } else if (take("<![CDATA[")) {
            read_until("]]>", &text);
        } else if (take("<!--")) {
            skip_comment();
        } else if (take("<?")) {
            skip_instruction();
        } else if (take("</")) {
            Buf closes = read_name();
            if (closes.size != name.size || memcmp(closes.at, name.at, name.size)) bad_xml("an element is closed by another's name");
            skip_space();
            if (!take(">")) bad_xml("an end tag has no >");
            put_text_child(b, &text, &has_children);
            return;
        } else {
            put_text_child(b, &text, &has_children);
            if (has_children) put_char(b, ',');
            has_children = true;
            read_element(b, depth + 1);
        }
    }
}

static void read_element(Buf *b, int depth) {
    if (depth > ELEMENTS_DEEP_MAX) bad_xml("elements are nested too deeply");
    if (!take("<")) bad_xml("an element is missing");
    elements++;
    Buf name = read_name(), seen = {0};
    put_text(b, "{\"name\":");
    put_string(b, name.at, name.size);
    put_text(b, ",\"attributes\":{");
    for (;;) {
        bool spaced = skip_space();
        if (at == end) bad_xml("a tag has no end");
        if (*at == '>' || *at == '/') break;
        if (!spaced) bad_xml("before an attribute stands a space");
        if (seen.size) put_char(b, ',');
        read_attribute(b, &seen);
    }
    put_text(b, "},\"children\":[");
    if (take(">")) read_children(b, name, depth);
    else if (!take("/>")) bad_xml("a tag has no >");
    put_text(b, "]}");
}

int main(void) {
    const Json *in = input(), *xml = need_string(in, "xml");
    keep_space = bool_or(in, "space", false);
    begin = at = xml->text;
    end = at + xml->size;
    take("\xEF\xBB\xBF");
    if (ahead("<?xml") && at + 5 < end && is_space(at[5])) {
        Buf declaration = {0};
        read_until("?>", &declaration);
    }
    Buf out = done_begin();
    done_key(&out, "root");
    skip_misc();
    read_element(&out, 1);
    skip_misc();
    if (at != end) bad_xml("something stands behind the outermost element");
    done_int(&out, "elements", elements);
    return done_end(&out);
}
