// Runs a body as a kernel of one block for tests/cuda/test_emulator*.py: nullptr, or what failed.
#pragma once

#include <exception>
#include <string>

#include <arch/base.h>

template <typename Body>
const char* failure_of(const Body& body) {
  static std::string message;
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

template <typename Body>
const char* probe(int threads, int shared_bytes, const Body& body) {
  return failure_of([&] { ercn::emulator::run({1, 1, 1}, threads, shared_bytes, body); });
}
