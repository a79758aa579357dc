/* "text" as a slug for URLs: lower-case ASCII letters and digits, joined by "separator" (default -), at most "limit" characters (default
 * 80), cut at a word. Letters of the Latin blocks lose their accents; others are left out. */
#include "cargo.h"

/* U+00C0 to U+017F, a comma after each */
static const char latin[] =
    "a,a,a,a,a,a,ae,c,e,e,e,e,i,i,i,i,d,n,o,o,o,o,o,,o,u,u,u,u,y,th,ss,a,a,a,a,a,a,ae,c,e,e,e,e,i,i,i,i,d,n,o,o,o,o,o,,o,u,u,u,u,y,th,y,"
    "a,a,a,a,a,a,c,c,c,c,c,c,c,c,d,d,d,d,e,e,e,e,e,e,e,e,e,e,g,g,g,g,g,g,g,g,h,h,h,h,i,i,i,i,i,i,i,i,i,i,ij,ij,j,j,k,k,k,l,l,l,l,l,l,l,l,"
    "l,l,n,n,n,n,n,n,n,n,n,o,o,o,o,o,o,oe,oe,r,r,r,r,r,r,s,s,s,s,s,s,s,s,t,t,t,t,t,t,u,u,u,u,u,u,u,u,u,u,u,u,w,w,y,y,y,z,z,z,z,z,z,s,";

static void put_latin(Buf *b, int index) {
    const char *at = latin;
    while (index--) at = strchr(at, ',') + 1;
    while (*at != ',') put_char(b, *at++);
}

int main(void) {
    const Json *in = input(), *text = need_string(in, "text");
    const char *separator = string_or(in, "separator", "-");
    if (strlen(separator) != 1 || !strchr("-_.", *separator)) bad_field("separator", "one of - _ .");
    size_t limit = (size_t)int_or(in, "limit", 80, 1, 1000);
    Buf slug = {0}, word = {0};
    for (size_t i = 0; i <= text->size; i++) {
        unsigned char c = text->text[i];
        size_t before = word.size;
        if (((c | 32) >= 'a' && (c | 32) <= 'z') || (c >= '0' && c <= '9')) {
            put_char(&word, lower(c));
        } else if (c >= 0xC3 && c <= 0xC5 && i + 1 < text->size) {
            int point = (c & 31) << 6 | (text->text[++i] & 63);
            if (point >= 0xC0 && point < 0x180) put_latin(&word, point - 0xC0);
            else continue;
        } else if (c == '\'' || c >= 0x80) {
            continue;
        }
        if (word.size > before || !word.size) continue;
        size_t more = word.size + (slug.size ? 1 : 0); /* a word has ended */
        if (slug.size + more > limit && slug.size) break;
        if (slug.size) put_char(&slug, *separator);
        put(&slug, word.at, word.size < limit ? word.size : limit);
        word.size = 0;
    }
    Buf out = done_begin();
    done_string(&out, "slug", slug.at, slug.size);
    return done_end(&out);
}
