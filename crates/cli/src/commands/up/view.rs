//! How `up` looks: while the herd comes up one line per node, on a terminal in its place; then the topology
//! and what to do with it; then the status, drawn again in its place, or a line per change.
//!
//! A terminal or pipe that goes away ends nothing: supervising is more important than being watched.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use pgherd_agent::files::herd;
use pgherd_agent::local::{Event, Home, client_files};
use pgherd_api::Status;

use crate::commands::psql::{self, Through};
use crate::output::live::Live;
use crate::output::numbers::span;
use crate::output::style::{Style, Tone};
use crate::output::{note, print_line, status};

const SPIN_EVERY: Duration = Duration::from_millis(120);

pub(crate) struct View {
    home: Home,
    /// What ends this view, or the herd.
    ending: &'static str,
    on_terminal: bool,
    bars: MultiProgress,
    nodes: BTreeMap<String, ProgressBar>,
    live: Live,
    status: Option<Box<Status>>,
    healthy: bool,
}

impl View {
    pub(crate) fn new(home: Home, ending: &'static str) -> View {
        View {
            home,
            ending,
            on_terminal: std::io::stdout().is_terminal() && std::io::stderr().is_terminal(),
            bars: MultiProgress::new(),
            nodes: BTreeMap::new(),
            live: Live::default(),
            status: None,
            healthy: false,
        }
    }

    pub(crate) fn show(&mut self, event: &Event) {
        match event {
            Event::Step { node: Some(node), text } if self.on_terminal && !self.healthy => {
                self.bar(node).set_message(text.clone());
            }
            Event::Step { node, text } => self.line(&said(node.as_deref(), text)),
            Event::Trouble { node, text } => {
                let warning = Style::of_stderr().paint(Tone::Doubtful, "warning:");
                self.line(&format!("{warning} {}", said(node.as_deref(), text)));
            }
            Event::Status { status } => {
                self.status = Some(status.clone());
                self.draw();
            }
            Event::Healthy { after_ms } => self.healthy(*after_ms),
            Event::Stopping => self.line("stops in order: the primary, then the standbys, then the agents"),
            Event::Stopped => {
                self.end();
                note("stopped");
            }
            // The command fails with it.
            Event::Failed { .. } => self.end(),
        }
    }

    /// A line that stays.
    pub(crate) fn line(&mut self, text: &str) {
        if !self.on_terminal {
            return note(text);
        }
        if self.healthy {
            let _gone = self.live.clear();
            note(text);
            self.draw();
        } else {
            let _gone = self.bars.println(text);
        }
    }

    /// Leaves the terminal as it should be.
    pub(crate) fn end(&mut self) {
        for bar in std::mem::take(&mut self.nodes).into_values() {
            bar.finish_and_clear();
        }
        if self.on_terminal && self.healthy {
            let _gone = self.live.clear();
            self.healthy = false;
        }
    }

    fn bar(&mut self, node: &str) -> &ProgressBar {
        let bars = &self.bars;
        self.nodes.entry(node.to_owned()).or_insert_with(|| {
            let style = ProgressStyle::with_template("{spinner} {prefix}  {wide_msg}");
            let bar = bars.add(ProgressBar::new_spinner());
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.set_prefix(node.to_owned());
            bar.enable_steady_tick(SPIN_EVERY);
            bar
        })
    }

    fn draw(&mut self) {
        if let (true, true, Some(status)) = (self.on_terminal, self.healthy, &self.status) {
            let mut lines = vec![String::new()];
            lines.extend(status::lines(status, Style::of_stdout()));
            lines.push(Style::of_stdout().paint(Tone::Faint, self.ending));
            let _gone = self.live.draw(&lines);
        }
    }

    fn healthy(&mut self, after_ms: u64) {
        for bar in std::mem::take(&mut self.nodes).into_values() {
            bar.finish_and_clear();
        }
        note(&format!("healthy after {}", span(after_ms)));
        let Some(status) = self.status.clone() else { return };
        let mut lines = Vec::new();
        if !self.on_terminal {
            lines.push(String::new());
            lines.extend(status::lines(&status, Style::of_stdout()));
        }
        lines.extend(what_next(&self.home, &status, self.ending));
        let _gone = print_line(&lines.join("\n"));
        self.healthy = true;
        self.draw();
    }
}

fn said(node: Option<&str>, text: &str) -> String {
    node.map_or(text.to_owned(), |node| format!("{node}: {text}"))
}

/// How to connect, and what to try.
fn what_next(home: &Home, status: &Status, ending: &str) -> Vec<String> {
    let dir = home.dir().display();
    let mut lines = vec![String::new()];
    if let Some(conninfo) = conninfo(home, status) {
        lines.push(format!("connect      pgherd psql --dir {dir}"));
        lines.push(format!("             psql \"{conninfo}\""));
    }
    let primary = status.clusters.first().and_then(|cluster| cluster.primary.as_deref()).unwrap_or("a");
    lines.push(format!("look         pgherd status --dir {dir} --watch"));
    lines.push(format!("kill it      kill -9 $(head -1 {dir}/{primary}/data/postmaster.pid)"));
    lines.push(format!("understand   pgherd explain --dir {dir}; pgherd history --dir {dir}"));
    lines.push(format!("hand over    pgherd switchover --dir {dir}"));
    lines.push(format!("end          {ending}"));
    lines
}

fn conninfo(home: &Home, status: &Status) -> Option<String> {
    let text = std::fs::read_to_string(home.herd_file()).ok()?;
    let read = herd::read("herd.toml", &text).ok()?;
    let cluster = status.clusters.first()?;
    let named = read.spec.clusters.iter().find(|named| named.name.as_str() == cluster.name)?;
    let database = named.databases.first()?;
    let files = client_files(home.dir());
    let proxy = Through::of(status, cluster, &read);
    psql::conninfo(cluster, proxy.as_ref(), None, database.name.as_str(), database.owner.as_str(), &files)
        .ok()
}
