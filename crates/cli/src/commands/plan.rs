//! `pgherd plan`: what a changed herd file would do.

use clap::Args;
use pgherd_agent::files::herd;
use pgherd_agent::local;
use pgherd_api::spec::{Impact, Plan, PlanRequest, PlannedChange};

use super::herd_file;
use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::style::{Style, Tone};
use crate::output::table::{Cell, Table};
use crate::output::{note, print_json, print_line};

/// Show what a changed herd file would do
///
/// Compares the file with what the herd follows now and says what each difference would cost. Changes
/// nothing; `pgherd apply` does.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {}

pub(crate) async fn run(_: PlanArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let (plan, _) = make(global, &agents).await?;
    if global.json {
        return print_json(&plan);
    }
    show(&plan.changes)?;
    if let Some(impact) = greatest(&plan.changes) {
        note(&format!("in all: {}; pgherd apply does it", impact_text(impact)));
    }
    Ok(())
}

/// The plan, and the request that it came from.
pub(super) async fn make(global: &Global, agents: &Agents) -> Result<(Plan, PlanRequest), Failure> {
    let file = herd_file::find(global)?;
    let (name, text) = (file.display().to_string(), herd_file::read(&file)?);
    let read = herd::read(&name, &text)?;
    if !read.warnings.is_empty() {
        note(read.warnings.to_string().trim_end());
    }
    let moves = read.spec.clusters.iter().any(|cluster| cluster.vip.is_some());
    let text = for_this_machine(global, &text, moves)?;
    let request = PlanRequest { text, file: Some(name) };
    let plan = agents.call(async |client| client.plan(&request).await).await?;
    Ok((plan, request))
}

/// A herd of `pgherd up` has all its nodes here, whatever hosts its file names. `moves`: the file has an address that
/// moves between hosts.
fn for_this_machine(global: &Global, text: &str, moves: bool) -> Result<String, Failure> {
    if global.url.is_some() {
        return Ok(text.to_owned());
    }
    match local::mapped_to(&global.dir()?, text)? {
        Some(mapped) => {
            note("this herd lives on one machine: hosts are taken as 127.0.0.1, with the ports it has here");
            if moves {
                note("[cluster.vip] is left out: on one machine there is nowhere for the address to move");
            }
            Ok(mapped)
        }
        None => Ok(text.to_owned()),
    }
}

pub(super) fn greatest(changes: &[PlannedChange]) -> Option<Impact> {
    changes.iter().map(|change| change.impact).max()
}

pub(super) fn show(changes: &[PlannedChange]) -> Result<(), Failure> {
    if changes.is_empty() {
        return print_line("nothing to do: the herd follows this file already");
    }
    let mut table = Table::new(&["WHAT", "FROM", "TO", "COST", "DONE BY"]);
    for change in changes {
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "–".to_owned());
        table.row(vec![
            Cell::new(change.path.clone()),
            Cell::new(text(&change.from)),
            Cell::new(text(&change.to)),
            Cell::new(impact_word(change.impact)).toned(impact_tone(change.impact)),
            Cell::new(change.action.clone()),
        ]);
    }
    print_line(&table.lines(Style::of_stdout()).join("\n"))
}

fn impact_word(impact: Impact) -> &'static str {
    match impact {
        Impact::None => "none",
        Impact::Reload => "reload",
        Impact::Restart => "restart",
        Impact::Switchover => "switchover",
        Impact::Clone => "clone",
        Impact::Destroy => "destroy",
    }
}

/// What the greatest of a plan's costs means to those who use the cluster.
pub(super) fn impact_text(impact: Impact) -> &'static str {
    match impact {
        Impact::None => "no effect on any session",
        Impact::Reload => "a reload, which no session notices",
        Impact::Restart => "sessions that end, by restarts of PostgreSQL or as told above",
        Impact::Switchover => "a switchover, which ends sessions and holds up writes for about a second",
        Impact::Clone => "copying whole data directories",
        Impact::Destroy => "removing what cannot be had back",
    }
}

fn impact_tone(impact: Impact) -> Tone {
    match impact {
        Impact::None | Impact::Reload => Tone::Plain,
        Impact::Restart | Impact::Switchover | Impact::Clone => Tone::Doubtful,
        Impact::Destroy => Tone::Bad,
    }
}
