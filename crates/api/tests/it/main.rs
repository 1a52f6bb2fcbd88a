//! What other programs depend on: the JSON contract of `status`.

mod schema;
