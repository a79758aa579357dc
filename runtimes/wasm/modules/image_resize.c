/* Scales a picture: "data" is base64 of a binary PPM (P6, 8 bits), or of raw RGB with "width" and "height"; "to_width" and "to_height" in
 * pixels, one of which may be left out to keep the shape. Each new pixel is the mean of what it covers (bilinear where it grows). Gives an
 * image line in format ppm, or rgb where "raw" is true. */
#include "cargo.h"

#define SIDE_MAX 4096

static size_t at;

static int64_t ppm_number(const Buf *b) {
    int64_t value = 0;
    while (at < b->size && (b->at[at] == ' ' || b->at[at] == '\n' || b->at[at] == '\r' || b->at[at] == '\t' || b->at[at] == '#')) {
        if (b->at[at] == '#') while (at < b->size && b->at[at] != '\n') at++;
        else at++;
    }
    size_t first = at;
    while (at < b->size && b->at[at] >= '0' && b->at[at] <= '9' && value < 100000) value = 10 * value + b->at[at++] - '0';
    if (at == first) fail("the picture's head is no PPM");
    return value;
}

/* Along one axis: row i of the output is a weighted mean of rows first[i] and on; weights are 16.16. */
static void scale(const uint8_t *in, uint8_t *out, int from, int to, int lines, int step, int line_step, int out_step, int out_line_step) {
    for (int i = 0; i < to; i++) {
        double low = (double)i * from / to, high = (double)(i + 1) * from / to;
        if (to > from) { /* grows: a window one pixel wide around the middle */
            low = (low + high - 1) / 2;
            high = low + 1;
        }
        int first = (int)(low < 0 ? low - 1 : low), last = (int)high;
        for (int line = 0; line < lines; line++) {
            for (int c = 0; c < 3; c++) {
                double sum = 0, weight = 0;
                for (int p = first; p <= last; p++) {
                    double part = (high < p + 1 ? high : p + 1) - (low > p ? low : p);
                    if (part <= 0) continue;
                    int inside = p < 0 ? 0 : p >= from ? from - 1 : p;
                    sum += part * in[inside * step + line * line_step + c];
                    weight += part;
                }
                out[i * out_step + line * out_line_step + c] = (uint8_t)(sum / weight + 0.5);
            }
        }
    }
}

int main(void) {
    const Json *in = input(), *text = need_string(in, "data");
    Buf data = base64_decode(text->text, text->size);
    int64_t width, height;
    if (data.size > 2 && data.at[0] == 'P' && data.at[1] == '6') {
        at = 2;
        width = ppm_number(&data);
        height = ppm_number(&data);
        if (ppm_number(&data) != 255) fail("the PPM has other than 8 bits a colour");
        at++;
    } else {
        width = int_or(in, "width", 0, 1, SIDE_MAX);
        height = int_or(in, "height", 0, 1, SIDE_MAX);
    }
    if (width < 1 || height < 1 || width > SIDE_MAX || height > SIDE_MAX) fail("the picture's sides are not between 1 and 4096");
    if (data.size < at || data.size - at != (size_t)(3 * width * height)) fail("the picture's data is not width x height x 3 bytes");
    int64_t to_width = int_or(in, "to_width", 0, 1, SIDE_MAX), to_height = int_or(in, "to_height", 0, 1, SIDE_MAX);
    if (!to_width && !to_height) fail("the input needs \"to_width\" or \"to_height\"");
    if (!to_width) to_width = (width * to_height + height / 2) / height;
    if (!to_height) to_height = (height * to_width + width / 2) / width;
    if (to_width < 1) to_width = 1;
    if (to_height < 1) to_height = 1;
    if (to_width > SIDE_MAX || to_height > SIDE_MAX) fail("the new sides are over 4096");
    uint8_t *wide = need(3 * to_width * height), *done = need(3 * to_width * to_height);
    int w = (int)width, h = (int)height, tw = (int)to_width, th = (int)to_height;
    scale((uint8_t *)data.at + at, wide, w, tw, h, 3, 3 * w, 3, 3 * tw);
    scale(wide, done, h, th, tw, 3 * tw, 3, 3 * tw, 3);
    Buf file = {0}, line = {0};
    bool raw = bool_or(in, "raw", false);
    if (!raw) {
        put_text(&file, "P6\n");
        put_int(&file, tw);
        put_char(&file, ' ');
        put_int(&file, th);
        put_text(&file, "\n255\n");
    }
    put(&file, (char *)done, (size_t)(3 * to_width * to_height));
    put_text(&line, "{\"type\":\"image\",\"format\":");
    put_text(&line, raw ? "\"rgb\",\"width\":" : "\"ppm\",\"width\":");
    put_int(&line, tw);
    put_text(&line, ",\"height\":");
    put_int(&line, th);
    put_text(&line, ",\"data\":\"");
    put_base64(&line, (uint8_t *)file.at, file.size);
    put_text(&line, "\"}\n");
    send(&line);
    Buf out = done_begin();
    done_int(&out, "width", tw);
    done_int(&out, "height", th);
    return done_end(&out);
}
