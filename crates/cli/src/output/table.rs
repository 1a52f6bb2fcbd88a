//! Columns under headings, as wide as their widest cell. The last column is not padded.

use super::style::{Style, Tone, plain};

#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
    right: bool,
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>) -> Cell {
        Cell { text: plain(&text.into()), tone: Tone::Plain, right: false }
    }

    pub(crate) fn toned(mut self, tone: Tone) -> Cell {
        self.tone = tone;
        self
    }

    /// For numbers.
    pub(crate) fn right(mut self) -> Cell {
        self.right = true;
        self
    }
}

#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(crate) fn new(headings: &[&str]) -> Table {
        let heading = |text: &&str| Cell::new(*text).toned(Tone::Faint);
        Table { rows: vec![headings.iter().map(heading).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    pub(crate) fn lines(&self, style: Style) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        // A heading stands on the side of what is below it.
        let right: Vec<bool> = (0..columns)
            .map(|column| self.rows.iter().any(|row| row.get(column).is_some_and(|cell| cell.right)))
            .collect();
        let line = |row: &Vec<Cell>| {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let gap = " ".repeat(widths[column] - cell.text.chars().count());
                let last = column + 1 == row.len();
                let text = style.paint(cell.tone, &cell.text);
                match (right[column], last) {
                    (true, _) => line.push_str(&format!("{gap}{text}")),
                    (false, true) => line.push_str(&text),
                    (false, false) => line.push_str(&format!("{text}{gap}")),
                }
                if !last {
                    line.push_str("  ");
                }
            }
            line.trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NODE", "LAG", "WHY"]);
        table.row(vec![Cell::new("a"), Cell::new("0 B").right(), Cell::new("holds term 4")]);
        table.row(vec![Cell::new("bb"), Cell::new("16 MiB").right(), Cell::new("")]);
        assert_eq!(
            table.lines(Style::PLAIN),
            ["NODE     LAG  WHY", "a        0 B  holds term 4", "bb    16 MiB"]
        );
    }
}
