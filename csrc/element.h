// What the coordinates of points and states may be on every device.
#pragma once

namespace clmfast {

enum class Element { float32, bfloat16, float16 };

}  // namespace clmfast
