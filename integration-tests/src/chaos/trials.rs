//! One fault, again and again, with what it costs measured.
