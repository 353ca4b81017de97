// Memory that things kept between calls take, in bytes: what their lists hold, without the allocator's own.
#pragma once
#include <cstddef>

#include "fused/program.h"

namespace wengert::fused {

std::size_t footprint(const Program& program);

// Of the programs that intern() keeps; and to keep them no longer.
std::size_t interned_bytes();
void forget_interned();

}  // namespace wengert::fused
