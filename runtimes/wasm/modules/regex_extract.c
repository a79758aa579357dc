/* All matches of "pattern" (POSIX extended) in "text": each with its groups and where it starts, in bytes of UTF-8. "ignore_case", "limit". */
#include "cargo.h"
#include <locale.h>
#include <regex.h>

#define GROUPS_MAX 32

int main(void) {
    const Json *in = input(), *text = need_string(in, "text");
    const char *pattern = need_string(in, "pattern")->text;
    int64_t limit = int_or(in, "limit", 1000, 1, 10000), count = 0;
    regex_t regex;
    setlocale(LC_CTYPE, "C.UTF-8"); /* a dot is a character, not a byte */
    int flags = REG_EXTENDED | REG_NEWLINE | (bool_or(in, "ignore_case", false) ? REG_ICASE : 0);
    int error = regcomp(&regex, pattern, flags);
    if (error) {
        char reason[128] = "\"pattern\" is no regular expression: ";
        size_t size = strlen(reason);
        regerror(error, &regex, reason + size, sizeof reason - size);
        fail(reason);
    }
    size_t groups = regex.re_nsub + 1 < GROUPS_MAX ? regex.re_nsub + 1 : GROUPS_MAX, at = 0;
    regmatch_t match[GROUPS_MAX];
    Buf out = done_begin();
    done_key(&out, "matches");
    put_char(&out, '[');
    while (count < limit && at <= text->size && !regexec(&regex, text->text + at, groups, match, at && text->text[at - 1] != '\n' ? REG_NOTBOL : 0)) {
        if (count++) put_char(&out, ',');
        put_text(&out, "{\"start\":");
        put_int(&out, (int64_t)at + match[0].rm_so);
        put_text(&out, ",\"text\":");
        put_string(&out, text->text + at + match[0].rm_so, match[0].rm_eo - match[0].rm_so);
        put_text(&out, ",\"groups\":[");
        for (size_t g = 1; g < groups; g++) {
            if (g > 1) put_char(&out, ',');
            if (match[g].rm_so < 0) put_text(&out, "null");
            else put_string(&out, text->text + at + match[g].rm_so, match[g].rm_eo - match[g].rm_so);
        }
        put_text(&out, "]}");
        at += match[0].rm_eo;
        if (match[0].rm_eo == match[0].rm_so) do at++; while (at < text->size && (text->text[at] & 0xC0) == 0x80);
    }
    put_char(&out, ']');
    done_int(&out, "count", count);
    return done_end(&out);
}
