pub mod spec;
pub mod types;
