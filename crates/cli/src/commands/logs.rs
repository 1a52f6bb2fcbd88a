//! `pgherd logs`: what agents and PostgreSQL wrote.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use pgherd_api::logs::{LogLine, LogSource, LogsQuery};
use pgherd_api::{CallError, Client};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::style::{Style, Tone, plain};
use crate::output::{note, print_json_line, print_line};

/// Nodes that have been silent for so long have told what they had.
const SETTLED: Duration = Duration::from_millis(150);
/// Nodes that are never silent are not waited for any longer.
const SETTLED_AT_LAST: Duration = Duration::from_secs(1);
/// Lines that wait to be printed; a slow terminal slows the streams down.
const QUEUE: usize = 256;

/// Show the logs of a node's agent and PostgreSQL
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Node [default: every node of this machine's herd, or the node that answers]
    #[arg(value_name = "NODE")]
    node: Option<String>,
    /// Go on with what is written from now on, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// So many of the last lines first
    #[arg(short = 'n', long, value_name = "LINES", default_value_t = 100)]
    tail: u32,
}

pub(crate) async fn run(args: LogsArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let query = LogsQuery { node: args.node.clone(), follow: args.follow, tail: Some(args.tail) };
    let clients = match agents.local() {
        all if args.node.is_none() && !all.is_empty() => all.to_vec(),
        _ => vec![agents.first_that_answers().await?],
    };
    let (sender, mut lines) = mpsc::channel(QUEUE);
    let streams: Vec<_> = clients
        .into_iter()
        .map(|client| tokio::spawn(stream(client, query.clone(), sender.clone())))
        .collect();
    drop(sender);

    let printing = async {
        let style = Style::of_stdout();
        let print = |line: &LogLine| {
            if global.json { print_json_line(line) } else { print_line(&shown(line, style)) }
        };
        // What each node has written so far comes in its own order; together it is put in the order of time.
        let (mut first, until) = (Vec::new(), Instant::now() + SETTLED_AT_LAST);
        while let Ok(Some(line)) = timeout_at(until.min(Instant::now() + SETTLED), lines.recv()).await {
            first.push(line);
        }
        in_order_of_time(first).iter().try_for_each(print)?;
        while let Some(line) = lines.recv().await {
            print(&line)?;
        }
        let (mut failures, asked) = (Vec::new(), streams.len());
        for stream in streams {
            if let Ok(Err(error)) = stream.await {
                failures.push(error);
            }
        }
        // One node's log is worth having without the others'.
        let told = failures.len() < asked;
        for failure in failures.iter().filter(|_| told) {
            note(&format!("warning: {failure}"));
        }
        failures.into_iter().next().filter(|_| !told).map_or(Ok(()), |error| Err(Failure::from(error)))
    };
    tokio::select! {
        ended = printing => ended,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn stream(client: Client, query: LogsQuery, lines: mpsc::Sender<LogLine>) -> Result<(), CallError> {
    let mut stream = client.logs(&query).await?;
    while let Some(line) = stream.next().await? {
        if lines.send(line).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// A line without a time belongs to the one before it.
fn in_order_of_time(lines: Vec<LogLine>) -> Vec<LogLine> {
    let mut latest: BTreeMap<(String, bool), Option<String>> = BTreeMap::new();
    let mut keyed: Vec<(Option<String>, LogLine)> = Vec::with_capacity(lines.len());
    for line in lines {
        let writer = latest.entry((line.node.clone(), line.source == LogSource::Agent)).or_default();
        if line.at.is_some() {
            writer.clone_from(&line.at);
        }
        keyed.push((writer.clone(), line));
    }
    keyed.sort_by(|(one, _), (other, _)| one.cmp(other));
    keyed.into_iter().map(|(_, line)| line).collect()
}

/// The time of a line stands in front, once.
fn shown(line: &LogLine, style: Style) -> String {
    let source = match line.source {
        LogSource::Agent => "agent",
        LogSource::Postgres => "postgres",
    };
    let text = plain(&line.text.replace('\t', "    "));
    let (at, text) = match &line.at {
        Some(at) => {
            let rest = without_time(&text, at).to_owned();
            (format!("{} ", style.paint(Tone::Faint, &plain(at))), rest)
        }
        None => (String::new(), text),
    };
    format!("{at}{}  {text}", style.paint(Tone::Strong, &format!("{} {source:8}", plain(&line.node))))
}

/// The line without the time that it begins with, as agents write it, or as PostgreSQL does: with a space, and
/// the zone behind it.
fn without_time<'a>(text: &'a str, at: &str) -> &'a str {
    if let Some(rest) = text.strip_prefix(at) {
        return rest.trim_start();
    }
    let spaced = at.trim_end_matches('Z').replacen('T', " ", 1);
    match text.strip_prefix(&spaced) {
        Some(rest) => rest.trim_start().split_once(' ').map_or("", |(_zone, rest)| rest),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continued_lines_stay_with_their_beginning() {
        let line = |node: &str, at: Option<&str>, text: &str| LogLine {
            node: node.to_owned(),
            source: LogSource::Postgres,
            at: at.map(str::to_owned),
            text: text.to_owned(),
        };
        let lines = vec![
            line("a", Some("02"), "ERROR"),
            line("a", None, "continued"),
            line("b", Some("01"), "first"),
            line("b", Some("03"), "last"),
        ];
        let sorted: Vec<String> = in_order_of_time(lines).into_iter().map(|line| line.text).collect();
        assert_eq!(sorted, ["first", "ERROR", "continued", "last"]);
    }

    #[test]
    fn a_line_tells_its_time_once() {
        let line = LogLine {
            node: "a".to_owned(),
            source: LogSource::Agent,
            at: Some("2026-11-21T01:43:56Z".to_owned()),
            text: "2026-11-21T01:43:56Z  INFO holds term 2".to_owned(),
        };
        assert_eq!(shown(&line, Style::PLAIN), "2026-11-21T01:43:56Z a agent     INFO holds term 2");
        let postgres = LogLine {
            source: LogSource::Postgres,
            at: Some("2026-11-21T02:29:52.434Z".to_owned()),
            text: "2026-11-21 02:29:52.434 UTC [6157] LOG:  ready".to_owned(),
            ..line.clone()
        };
        assert_eq!(shown(&postgres, Style::PLAIN), "2026-11-21T02:29:52.434Z a postgres  [6157] LOG:  ready");
        let without = LogLine { at: None, source: LogSource::Postgres, text: "\u{1b}[2J".to_owned(), ..line };
        assert_eq!(shown(&without, Style::PLAIN), "a postgres  \u{fffd}[2J");
    }
}
