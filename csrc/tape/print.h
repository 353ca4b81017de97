// Tapes and operators as text, for reports and debugging.
#pragma once
#include <string>

#include "tape/tape.h"

namespace wengert::tape {

std::string to_string(const Tape& tape);
std::string to_string(const Pullback& pullback);

}  // namespace wengert::tape
