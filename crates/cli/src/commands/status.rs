//! `pgherd status`: topology, roles, lag, term, what a commit is worth.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use pgherd_api::Status;

use crate::args::Global;
use crate::connect::Agents;
use crate::failure::Failure;
use crate::output::live::Live;
use crate::output::style::Style;
use crate::output::{note, print_json, print_json_line, print_line, status};

const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Show topology, roles, lag, term and what a commit is worth
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Go on, and show every change until Ctrl-C
    #[arg(short, long)]
    watch: bool,
}

pub(crate) async fn run(args: StatusArgs, global: &Global) -> Result<(), Failure> {
    let agents = Agents::find(global)?;
    if args.watch {
        return watch(&agents, global).await;
    }
    let status = ask(&agents, global).await?;
    if global.json {
        return print_json(&status);
    }
    print_line(&status::lines(&status, Style::of_stdout()).join("\n"))
}

/// The herd's status, of one cluster where one was named.
async fn ask(agents: &Agents, global: &Global) -> Result<Status, Failure> {
    let mut status = agents.call(async |client| client.status().await).await?;
    if let Some(named) = &global.cluster {
        super::cluster(&status, Some(named))?;
        status.clusters.retain(|cluster| cluster.name == *named);
        status.proxy.retain(|proxy| proxy.cluster == *named);
    }
    Ok(status)
}

async fn watch(agents: &Agents, global: &Global) -> Result<(), Failure> {
    let on_terminal = std::io::stdout().is_terminal() && !global.json;
    let mut live = Live::default();
    let mut last = String::new();
    let watching = async {
        loop {
            let asked = ask(agents, global).await;
            let shown = match &asked {
                Ok(status) if global.json => serde_json::to_string(status).unwrap_or_default(),
                Ok(status) => status::lines(status, Style::of_stdout()).join("\n"),
                // A herd that does not answer for a moment is what one watches for.
                Err(failure) => failure.text(),
            };
            if on_terminal {
                let lines: Vec<String> = shown.lines().map(str::to_owned).collect();
                live.draw(&lines).map_err(|error| Failure::output(&error))?;
            } else if shown != last {
                match &asked {
                    Ok(status) if global.json => print_json_line(status)?,
                    Ok(_) => print_line(&format!("{shown}\n"))?,
                    Err(_) => note(&shown),
                }
            }
            last = shown;
            tokio::time::sleep(WATCH_EVERY).await;
        }
    };
    tokio::select! {
        ended = watching => ended,
        // The usual way to end it.
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}
