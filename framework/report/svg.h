// Pieces that all figures share.
#ifndef SIKV_FRAMEWORK_REPORT_SVG_H_
#define SIKV_FRAMEWORK_REPORT_SVG_H_

#include <string>

namespace sikv {

// Text as XML holds it.
std::string svg_escaped(const std::string& text);

// A figure of that size, white, around what `body` draws.
std::string svg_document(int width, int height, const std::string& body);

// Columns of pixels that a text of 12 pixels takes, about.
double svg_text_width(const std::string& text);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_REPORT_SVG_H_
