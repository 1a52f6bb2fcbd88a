//! What commands have in common when they print: stdout that may go away, colours, tables, questions.

pub(crate) mod confirm;
pub(crate) mod live;
pub(crate) mod numbers;
pub(crate) mod progress;
pub(crate) mod status;
pub(crate) mod style;
pub(crate) mod table;

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Writes data to stdout, all of it or a failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::output(&error))
}

/// A text and a line end.
pub(crate) fn print_line(text: &str) -> Result<(), Failure> {
    print(&format!("{text}\n"))
}

/// JSON for programs, readable for people too.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::failed("the answer cannot be written as JSON").because(error))?;
    print_line(&text)
}

/// One line of JSON, for streams.
pub(crate) fn print_json_line(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::failed("a line cannot be written as JSON").because(error))?;
    print_line(&text)
}

/// A remark that is not data. Without a stderr there is nobody to miss it.
pub(crate) fn note(text: &str) {
    let _unread = writeln!(io::stderr(), "{text}");
}

/// What the libraries say, as far as `-v` asks for it.
pub(crate) fn trace_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "error",
        1 => "info",
        _ => "debug",
    };
    start_tracing(&format!("off,pgherd={level},pgherd_agent={level},pgherd_api={level}"));
}

/// What an agent or a supervisor says: its log. `PGHERD_LOG` overrides it, in the form of `RUST_LOG`.
pub(crate) fn trace_as_log(verbose: u8) {
    let filter = match (std::env::var("PGHERD_LOG"), verbose) {
        (Ok(filter), _) if !filter.is_empty() => filter,
        (_, 0) => "info,openraft=warn".to_owned(),
        (_, 1) => "debug,openraft=info".to_owned(),
        (_, _) => "trace".to_owned(),
    };
    start_tracing(&filter);
}

fn start_tracing(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(style::Style::of_stderr() != style::Style::PLAIN);
    // A second one, in a test, would be refused, and the first one stays.
    let _already = subscriber.try_init();
}
