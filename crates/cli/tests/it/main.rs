//! The program as a person runs it: its command line, and a herd on this machine.

mod command_line;
mod run;
