//! `pgherd check`: for monitoring, in the exit codes and words of monitoring plugins.

use clap::Args;
use pgherd_api::report::{CheckItem, CheckReport, CheckState};

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::style::{Style, Tone, plain};
use crate::output::table::{Cell, Table};
use crate::output::{print_json, print_line};

/// Check the herd for monitoring
///
/// Prints one line a check. Exits with 0 if all is well, 1 for a warning, 2 if something is critical, and 3
/// if it cannot be known.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Print one line with performance data, as monitoring plugins do
    #[arg(long, conflicts_with = "json")]
    nagios: bool,
}

pub(crate) async fn run(args: CheckArgs, global: &Global) -> Result<(), Failure> {
    told(&report(global).await, args.nagios, global)
}

/// Prints a report and ends as it says.
pub(super) fn told(report: &CheckReport, nagios: bool, global: &Global) -> Result<(), Failure> {
    if global.json {
        print_json(report)?;
    } else if nagios {
        print_line(&plugin_output(report))?;
    } else {
        print_line(&table(report).lines(Style::of_stdout()).join("\n"))?;
    }
    match report.worst().exit_code() {
        0 => Ok(()),
        code => Err(Failure::Silent(code)),
    }
}

/// What agents report; where none answers, that is the report.
async fn report(global: &Global) -> CheckReport {
    let asked = async {
        let agents = Agents::find(global)?;
        agents.call(async |client| client.check().await).await
    };
    match asked.await {
        Ok(mut report) => {
            if let Some(named) = &global.cluster {
                report.checks.retain(|item| item.cluster.as_ref().is_none_or(|cluster| cluster == named));
            }
            report
        }
        Err(failure) => CheckReport { checks: vec![unknown("agent", &failure)] },
    }
}

/// What could not be asked.
pub(super) fn unknown(check: &str, failure: &Failure) -> CheckItem {
    CheckItem {
        check: check.to_owned(),
        cluster: None,
        node: None,
        state: CheckState::Unknown,
        message: failure.message(),
        measure: None,
        hint: failure.first_hint(),
    }
}

fn table(report: &CheckReport) -> Table {
    let mut table = Table::new(&["STATE", "CHECK", "OF", "WHAT"]);
    for item in &report.checks {
        let of = [&item.cluster, &item.node].into_iter().flatten().map(String::as_str).collect::<Vec<_>>();
        let hint = item.hint.as_ref().map_or(String::new(), |hint| format!(" ({hint})"));
        table.row(vec![
            Cell::new(item.state.to_string()).toned(tone(item.state)),
            Cell::new(item.check.clone()),
            Cell::new(of.join("/")),
            Cell::new(format!("{}{hint}", item.message)),
        ]);
    }
    table
}

fn tone(state: CheckState) -> Tone {
    match state {
        CheckState::Ok => Tone::Good,
        CheckState::Warning => Tone::Doubtful,
        CheckState::Critical => Tone::Bad,
        CheckState::Unknown => Tone::Doubtful,
    }
}

/// `PGHERD CRITICAL - what is wrong | lag_bytes=0`: the first line is what a pager shows.
fn plugin_output(report: &CheckReport) -> String {
    let worst = report.worst();
    let wrong: Vec<String> = report
        .checks
        .iter()
        .filter(|item| item.state != CheckState::Ok)
        .map(|item| plain(&item.message).replace('|', "/"))
        .collect();
    let what = match wrong.as_slice() {
        [] if report.checks.is_empty() => "nothing was checked".to_owned(),
        [] => format!("{} checks passed", report.checks.len()),
        wrong => wrong.join("; "),
    };
    // Values of several nodes need labels that differ.
    let measures: Vec<String> = report
        .checks
        .iter()
        .filter_map(|item| {
            let (label, value) = item.measure.as_deref()?.split_once('=')?;
            let owner =
                item.node.as_deref().or(item.cluster.as_deref()).map_or(String::new(), |of| format!("{of}_"));
            Some(format!("{owner}{label}={value}"))
        })
        .collect();
    let measures = if measures.is_empty() { String::new() } else { format!(" | {}", measures.join(" ")) };
    format!("PGHERD {worst} - {what}{measures}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(state: CheckState, node: Option<&str>, message: &str, measure: Option<&str>) -> CheckItem {
        CheckItem {
            check: "x".to_owned(),
            cluster: Some("main".to_owned()),
            node: node.map(str::to_owned),
            state,
            message: message.to_owned(),
            measure: measure.map(str::to_owned),
            hint: None,
        }
    }

    #[test]
    fn a_pager_reads_what_is_wrong_first() {
        let mut report = CheckReport {
            checks: vec![
                item(CheckState::Ok, Some("b"), "b streams", Some("lag_bytes=0")),
                item(CheckState::Ok, Some("c"), "c streams", Some("lag_bytes=16")),
            ],
        };
        assert_eq!(plugin_output(&report), "PGHERD OK - 2 checks passed | b_lag_bytes=0 c_lag_bytes=16");
        report.checks.push(item(CheckState::Critical, None, "no primary | at all", None));
        assert_eq!(
            plugin_output(&report),
            "PGHERD CRITICAL - no primary / at all | b_lag_bytes=0 c_lag_bytes=16"
        );
        assert_eq!(plugin_output(&CheckReport { checks: vec![] }), "PGHERD UNKNOWN - nothing was checked");
    }
}
