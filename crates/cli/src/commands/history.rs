//! `pgherd history`: terms, elections and switchovers, with reasons and losses.

use clap::Args;
use pgherd_api::report::{HistoryEntry, HistoryQuery};

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::numbers::{bytes, counted, span};
use crate::output::style::{Style, Tone};
use crate::output::table::{Cell, Table};
use crate::output::{print_json, print_line};

/// Show terms, elections and switchovers, with their reasons and losses
#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Show only the newest so many
    #[arg(short = 'n', long, value_name = "COUNT")]
    limit: Option<u32>,
}

pub(crate) async fn run(args: HistoryArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let query = HistoryQuery { cluster: global.cluster.clone(), limit: args.limit };
    let history = agents.call(async |client| client.history(&query).await).await?;
    if global.json {
        return print_json(&history);
    }
    if history.entries.is_empty() {
        return print_line("nothing has happened yet");
    }
    let mut table = Table::new(&["WHEN", "TERM", "WHAT", "LOST", "WRITES WAITED"]);
    for entry in &history.entries {
        let (lost, tone) = loss(entry);
        table.row(vec![
            Cell::new(entry.at.clone()),
            Cell::new(entry.term.map_or(String::new(), |term| term.to_string())).right(),
            Cell::new(told(entry)),
            Cell::new(lost).toned(tone),
            Cell::new(entry.write_gap_ms.map_or(String::new(), span)),
        ]);
    }
    print_line(&table.lines(Style::of_stdout()).join("\n"))
}

fn told(entry: &HistoryEntry) -> String {
    match &entry.operator {
        Some(operator) => format!("{} (asked for by {operator})", entry.reason),
        None => entry.reason.clone(),
    }
}

/// 0, a count, or nothing where the event cannot lose anything.
fn loss(entry: &HistoryEntry) -> (String, Tone) {
    match (entry.lost_transactions, entry.lost_bytes) {
        (None, None) => (String::new(), Tone::Plain),
        (Some(0), _) => ("0".to_owned(), Tone::Good),
        (None, Some(0)) => ("0".to_owned(), Tone::Good),
        (Some(count), _) => {
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            (counted(count, "transaction", "transactions"), Tone::Bad)
        }
        (None, Some(lost)) => (format!("{} of WAL", bytes(lost)), Tone::Bad),
    }
}
