//! The files of people: recorded findings for bad ones, and properties that hold for any.

mod golden;
mod properties;
