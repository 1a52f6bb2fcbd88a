//! What the command line says: its reference, its refusals, its exit codes.
//!
//! `PGHERD_UPDATE_GOLDEN=1` writes what is said instead of comparing.

use std::path::Path;

use crate::run::{output, transcript};

/// Compares with a file of the project.
#[track_caller]
fn compare(file: &str, said: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("PGHERD_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, said).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        said == expected,
        "{} differs; if what follows is right, set PGHERD_UPDATE_GOLDEN=1 and look at the diff\n\n{said}",
        path.display()
    );
}

/// The commands that the help names.
fn commands(help: &str) -> Vec<&str> {
    let listed =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    listed.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect()
}

#[test]
fn golden_reference_of_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let help = |arguments: &[&str]| {
        let output = output(dir.path(), arguments);
        assert!(output.status.success(), "{arguments:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        format!("```text\n{}\n```\n", lines.join("\n").trim_end())
    };
    let all = String::from_utf8(output(dir.path(), &["--help"]).stdout).unwrap();
    let mut page = format!(
        "# The command line\n\nMade from the program; `PGHERD_UPDATE_GOLDEN=1 cargo test -p pgherd golden` writes \
         it.\n\n{}",
        help(&["--help"])
    );
    for command in commands(&all) {
        page.push_str(&format!("\n## pgherd {command}\n\n{}", help(&[command, "--help"])));
        let nested: &[&str] = match command {
            "operator" => &["add"],
            "backup" => {
                &["init", "create", "list", "show", "verify", "check", "delete", "undelete", "keep", "expire"]
            }
            "wal" => &["push", "fetch", "list"],
            _ => &[],
        };
        for action in nested {
            page.push_str(&format!(
                "\n### pgherd {command} {action}\n\n{}",
                help(&[command, action, "--help"])
            ));
        }
    }
    compare("../../docs/reference/cli.md", &page);
}

#[test]
fn golden_refusals() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    file("empty.toml", "");
    file("herd.toml", "name = \"shop\"\n[postgres]\nversion = 15\n[[cluster]]\nname = \"main\"\nneded = 1\n");
    file("agent.toml", "name = \"a\"\nstate_dir = \"/var/lib/pgherd\"\nlisten = \"8009\"\n");
    let commands: &[&[&str]] = &[
        // The command line itself.
        &["statsu"],
        &["status", "--colour"],
        &["status", "--herd", "herd.toml"],
        &["psql", "--json"],
        &["failover"],
        &["down", "--yes"],
        &["token", "--valid-for", "soon"],
        // What is not built.
        &["proxy"],
        &["restart", "--fast"],
        &["switchover", "--at", "12:00"],
        // Files.
        &["validate"],
        &["validate", "--json", "agent.toml"],
        &["validate", "agent.toml", "--herd", "herd.toml"],
        &["validate", "missing.toml"],
        &["init", "--node", "a"],
        &["agent"],
        &["agent", "--config", "agent.toml"],
        // Nobody to ask.
        &["status"],
        &["status", "--json"],
        &["plan", "--herd", "herd.toml"],
        &["check"],
        &["check", "--nagios"],
        &["check", "--nagios", "--json"],
        &["status", "--url", "https://192.0.2.1:8009"],
        &["down"],
        &["down", "--delete"],
    ];
    let transcripts: Vec<String> = commands.iter().map(|command| transcript(dir.path(), command)).collect();
    compare("tests/it/refusals.txt", &transcripts.join("\n"));
}

#[test]
fn every_name_of_the_design_is_there_or_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let names = "up down init token agent proxy fence operator validate plan apply status check switchover failover \
                 restart reload reinit pause resume secret store history explain logs doctor drill backup restore wal \
                 psql top adopt import";
    for name in names.split_whitespace() {
        let refused = output(dir.path(), &[name, "--some", "option"]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        let known = output(dir.path(), &[name, "--help"]).status.success();
        assert!(known || said.contains(&format!("pgherd {name} is not built yet")), "{name}: {said}");
        let usage = if name == "check" { 3 } else { 2 };
        assert_eq!(refused.status.code(), Some(usage), "{name}: {said}");
    }
}

#[test]
fn monitoring_takes_a_mistake_in_its_own_command_line_for_unknown() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [&["check", "--frob"][..], &["--json", "check", "extra"], &["check", "--herd", "x"]] {
        assert_eq!(output(dir.path(), arguments).status.code(), Some(3), "{arguments:?}");
    }
    assert_eq!(output(dir.path(), &["check", "--help"]).status.code(), Some(0));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let mut command = crate::run::pgherd(dir.path(), &["completions", "bash"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn pages_of_the_manual_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man");
    assert!(output(dir.path(), &["man", pages.to_str().unwrap()]).status.success());
    let page = std::fs::read_to_string(pages.join("pgherd-switchover.1")).unwrap();
    assert!(page.contains("Hand over to another node") && page.contains("\\-\\-to"));
    assert!(!page.contains("\\-\\-herd"), "an option that means nothing to it");
}

#[test]
fn as_root_no_agent_runs_and_no_herd_is_made() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let dir = tempfile::tempdir().unwrap();
    let agent = format!("name = \"a\"\nstate_dir = \"{}\"\n", dir.path().display());
    std::fs::write(dir.path().join("agent.toml"), agent).unwrap();
    let herd = "name = \"shop\"\n[postgres]\nversion = 15\n[[cluster]]\nname = \"main\"\ndurability = \"async\"\n\
                [[cluster.node]]\nname = \"a\"\nhost = \"192.0.2.1\"\n";
    std::fs::write(dir.path().join("herd.toml"), herd).unwrap();
    for command in [&["agent", "--config", "agent.toml"][..], &["init", "--config", "agent.toml"]] {
        let said = transcript(dir.path(), command);
        assert!(said.contains("does not run as root") && said.contains("exit code 2"), "{said}");
    }
    assert!(!dir.path().join("raft").exists());
}

/// PostgreSQL takes every exit code up to 125 of its restore_command for the end of the WAL, and promotes.
#[test]
fn case_24_a_fetch_that_cannot_tell_exits_above_125_whatever_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    file("nowhere.toml", "repository = \"file:///nowhere/at/all\"\n");
    file("wrong.toml", "repositry = 1\n");
    let name = "000000010000000000000001";
    for arguments in [
        &["wal", "fetch"][..],
        &["wal", "fetch", "--repositry", "r.toml", name, "to"],
        &["wal", "fetch", "--repository", "absent.toml", name, "to"],
        &["wal", "fetch", "--repository", "wrong.toml", name, "to"],
        &["wal", "fetch", "--repository", "nowhere.toml", name, "to"],
        &["wal", "fetch", "--repository", "nowhere.toml", name],
        &["--herd", "x", "wal", "fetch", "--repository", "nowhere.toml", name, "to"],
    ] {
        let output = output(dir.path(), arguments);
        assert_eq!(output.status.code(), Some(200), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?} says nothing");
    }
    assert!(!dir.path().join("to").exists());
}
