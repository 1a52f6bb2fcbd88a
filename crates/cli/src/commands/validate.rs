//! `pgherd validate`: every mistake of herd and agent files at once.

use std::path::{Path, PathBuf};

use clap::Args;
use pgherd_agent::files::agent::AgentFile;
use pgherd_agent::files::{Findings, herd};

use super::herd_file;
use crate::args::Global;
use crate::failure::Failure;
use crate::output::numbers::counted;
use crate::output::{print, print_json, print_line};

/// Check herd and agent files and tell every mistake at once
///
/// Looks at the files alone and asks no agent, so it runs anywhere. Exits with 2 if there is a mistake; a
/// warning is none.
#[derive(Debug, Args)]
pub(crate) struct ValidateArgs {
    /// Files to check; a file named agent.toml is taken for an agent's [default: the herd file]
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// All given files are agent files, whatever their names
    #[arg(long, requires = "files")]
    agent: bool,
}

pub(crate) fn run(args: ValidateArgs, global: &Global) -> Result<(), Failure> {
    let files = match (args.files.is_empty(), &global.herd) {
        (false, None) => args.files,
        (false, Some(_)) => return Err(Failure::usage("files and --herd name the same thing twice")),
        (true, _) => vec![herd_file::find(global)?],
    };
    let mut all = Findings::default();
    for file in &files {
        let is_agent = args.agent || file.file_name().is_some_and(|name| name == "agent.toml");
        let (findings, summary) = check(file, is_agent)?;
        if !global.json {
            print(&findings.to_string())?;
            print_line(&summary)?;
        }
        all.0.extend(findings.0);
    }
    if global.json {
        print_json(&all)?;
    }
    if all.errors() > 0 { Err(Failure::Silent(2)) } else { Ok(()) }
}

/// What is wrong with a file, and one line that sums it up.
fn check(file: &Path, is_agent: bool) -> Result<(Findings, String), Failure> {
    let (name, text) = (file.display().to_string(), herd_file::read(file)?);
    let (findings, what) = if is_agent {
        match AgentFile::read(&name, &text) {
            Ok(agent) => (Findings::default(), format!("agent of node {}", agent.name)),
            Err(findings) => (findings, String::new()),
        }
    } else {
        match herd::read(&name, &text) {
            Ok(herd) => {
                let nodes = herd.spec.clusters.iter().map(|cluster| cluster.nodes.len()).sum();
                (herd.warnings, format!("herd {}, {}", herd.spec.name, counted(nodes, "node", "nodes")))
            }
            Err(findings) => (findings, String::new()),
        }
    };
    let summary = match (findings.errors(), findings.0.len()) {
        (0, 0) => format!("{name}: fine: {what}"),
        (0, warnings) => format!("{name}: fine, with {}: {what}", counted(warnings, "warning", "warnings")),
        (errors, _) => format!("{name}: {}", counted(errors, "mistake", "mistakes")),
    };
    Ok((findings, summary))
}
