//! `pgherd apply`: makes the herd follow a changed herd file.

use std::time::Duration;

use clap::Args;
use pgherd_api::spec::{ApplyRequest, Impact};

use super::plan;
use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::confirm::confirm;
use crate::output::{note, print_json, print_line};

/// The store is written and nothing is waited for.
const APPLY_WITHIN: Duration = Duration::from_secs(20);

/// Make the herd follow a changed herd file
///
/// Shows the plan first. Asks before anything that ends sessions or removes something.
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

pub(crate) async fn run(args: ApplyArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    let (plan, request) = plan::make(global, &agents).await?;
    let impact = plan::greatest(&plan.changes).unwrap_or(Impact::None);
    if !global.json {
        plan::show(&plan.changes)?;
    }
    if plan.changes.is_empty() {
        return if global.json { print_json(&plan) } else { Ok(()) };
    }
    if impact > Impact::Reload {
        let what = format!("this means {}", plan::impact_text(impact));
        confirm(&what, "Apply it?", args.yes)?;
    }
    let request =
        ApplyRequest { text: request.text, file: request.file, generation: plan.generation, accept: impact };
    let applied = agents.call_within(APPLY_WITHIN, async |client| client.apply(&request).await).await?;
    if global.json {
        return print_json(&applied);
    }
    print_line(&format!("the herd follows specification {}", applied.generation))?;
    note("pgherd status shows it being carried out");
    Ok(())
}
