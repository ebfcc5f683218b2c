//! The gRPC API: one file per service. Each parses a request, calls, and maps the answer.

mod validate;
