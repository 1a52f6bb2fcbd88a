//! Links of the documentation: each leads to a file of the project, and to a heading that is there.

use std::collections::{BTreeMap, BTreeSet};

use super::{Complaint, File};

pub(super) fn check(files: &[File]) -> Vec<Complaint> {
    let mut places: BTreeSet<String> = files.iter().map(|file| file.path.clone()).collect();
    for file in files {
        let mut path = file.path.as_str();
        while let Some((directory, _)) = path.rsplit_once('/') {
            places.insert(directory.to_owned());
            path = directory;
        }
    }
    let headings: BTreeMap<&str, BTreeSet<String>> = files
        .iter()
        .filter(|file| file.is_markdown())
        .map(|file| (file.path.as_str(), anchors(&file.text)))
        .collect();

    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.is_markdown()) {
        for (line, link) in links(&file.text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (target, anchor) =
                link.split_once('#').map_or((link, None), |(target, anchor)| (target, Some(anchor)));
            let path = if target.is_empty() { Some(file.path.clone()) } else { resolve(&file.path, target) };
            let why = "a reader who follows a link must arrive";
            let Some(path) = path.filter(|path| places.contains(path)) else {
                complaints.push(file.complaint(line, format!("the link \"{link}\" leads to no file"), why));
                continue;
            };
            let known = anchor.is_none_or(|anchor| {
                headings.get(path.as_str()).is_none_or(|headings| headings.contains(anchor))
            });
            if !known {
                complaints.push(file.complaint(
                    line,
                    format!("the link \"{link}\" leads to no heading"),
                    why,
                ));
            }
        }
    }
    complaints
}

/// Lines outside of fenced blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            return None;
        }
        (!fenced).then_some((index + 1, line))
    })
}

/// Targets of `[text](target)` and `[name]: target`.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut links = Vec::new();
    for (number, line) in prose(text) {
        let mut rest = line;
        while let Some(at) = rest.find("](") {
            let after = &rest[at + 2..];
            let end = after.find([')', ' ']).unwrap_or(after.len());
            // `a[0](b)` in code is no link.
            let in_code = rest[..at].matches('`').count() % 2 == 1;
            if !in_code {
                links.push((number, after[..end].trim_matches(['<', '>'])));
            }
            rest = after;
        }
        if let Some((name, target)) = line.split_once("]: ")
            && name.starts_with('[')
            && !name.starts_with("[^")
        {
            links.push((number, target.split_whitespace().next().unwrap_or("")));
        }
    }
    links
}

/// Headings as the links of code hosts name them: lower case, blanks to hyphens, punctuation gone.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for (_, line) in prose(text) {
        let Some(heading) = line.strip_prefix('#').map(|rest| rest.trim_start_matches('#').trim()) else {
            continue;
        };
        let kept = heading
            .to_lowercase()
            .chars()
            .filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter))
            .collect::<String>();
        let anchor = kept.replace(' ', "-");
        let mut number = 0;
        let mut unique = anchor.clone();
        while !anchors.insert(unique.clone()) {
            number += 1;
            unique = format!("{anchor}-{number}");
        }
    }
    anchors
}

/// A relative target from the file that names it; `None` where it leaves the project.
fn resolve(from: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = if target.starts_with('/') {
        Vec::new()
    } else {
        from.split('/').take(from.matches('/').count()).collect()
    };
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_somewhere() {
        let file = |path: &str, text: &str| File { path: path.to_owned(), text: text.to_owned() };
        let files = [
            file(
                "README.md",
                "[a](docs/a.md) [b](docs/a.md#two-words) [c](docs) [d](https://x.y/z) `x[0](y)`\n```\n[e](gone)\n```\n[f](#top)\n# Top\n",
            ),
            file(
                "docs/a.md",
                "## Two words!\n[up](../README.md)\n[out](../../x.md)\n[gone](b.md)\n[head](#three)\n[ref]: gone.md\n",
            ),
        ];
        let told: Vec<String> =
            check(&files).iter().map(|complaint| format!("{}:{}", complaint.path, complaint.line)).collect();
        assert_eq!(told, ["docs/a.md:3", "docs/a.md:4", "docs/a.md:5", "docs/a.md:6"]);
    }
}
