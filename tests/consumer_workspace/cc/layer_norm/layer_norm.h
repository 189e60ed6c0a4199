// The consumer's own header, at the same path in its repository as flashtrain's has in its own.
#pragma once

namespace consumer {

inline constexpr char kLayerNormOwner[] = "consumer";

}  // namespace consumer
