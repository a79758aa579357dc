/* "encode" (default) or "decode", as "op" says. Encoding takes "text", or any bytes as "hex". Decoding gives "text" where the bytes are
 * UTF-8, and "hex" always. "url": the alphabet for URLs, without padding. */
#include "cargo.h"

static bool is_utf8(const uint8_t *p, size_t size) {
    for (size_t i = 0; i < size;) {
        uint8_t c = p[i++];
        int more = c < 0x80 ? 0 : c >= 0xC2 && c < 0xE0 ? 1 : c >= 0xE0 && c < 0xF0 ? 2 : c >= 0xF0 && c < 0xF5 ? 3 : -1;
        if (more < 0 || i + more > size) return false;
        uint32_t value = more == 1 ? c & 31 : more == 2 ? c & 15 : c & 7;
        for (int k = 0; k < more; k++, i++) {
            if ((p[i] & 0xC0) != 0x80) return false;
            value = value << 6 | (p[i] & 63);
        }
        if ((more == 2 && (value < 0x800 || (value >= 0xD800 && value < 0xE000))) || (more == 3 && (value < 0x10000 || value > 0x10FFFF)))
            return false;
    }
    return true;
}

static int hex_digit(char c) {
    return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

static Buf to_encode(const Json *in) {
    Buf b = {0};
    if (!field(in, "hex")) {
        const Json *text = need_string(in, "text");
        return (Buf){(char *)text->text, text->size, text->size};
    }
    const Json *hex = need_string(in, "hex");
    for (size_t i = 0; i < hex->size; i += 2) {
        int high = hex_digit(hex->text[i]), low = hex_digit(hex->text[i + 1]); /* a zero byte follows the last one */
        if (high < 0 || low < 0) bad_field("hex", "pairs of hexadecimal digits");
        put_char(&b, (char)(high << 4 | low));
    }
    return b;
}

int main(void) {
    const Json *in = input();
    const char *op = string_or(in, "op", "encode");
    Buf out = done_begin();
    if (!strcmp(op, "encode")) {
        Buf data = to_encode(in), text = {0};
        put_base64(&text, (uint8_t *)data.at, data.size);
        if (bool_or(in, "url", false)) {
            while (text.size && text.at[text.size - 1] == '=') text.size--;
            for (size_t i = 0; i < text.size; i++) text.at[i] = text.at[i] == '+' ? '-' : text.at[i] == '/' ? '_' : text.at[i];
        }
        done_string(&out, "base64", text.at, text.size);
        done_int(&out, "bytes", (int64_t)data.size);
    } else if (!strcmp(op, "decode")) {
        const Json *text = need_string(in, "text");
        Buf data = base64_decode(text->text, text->size), hex = {0};
        if (is_utf8((uint8_t *)data.at, data.size)) done_string(&out, "text", data.at, data.size);
        put_hex(&hex, (uint8_t *)data.at, data.size);
        done_string(&out, "hex", hex.at, hex.size);
        done_int(&out, "bytes", (int64_t)data.size);
    } else {
        bad_field("op", "encode or decode");
    }
    return done_end(&out);
}
