//! How figures look in tables.

use super::cells::Figure;

/// A value with three significant digits, or none behind the point where it has enough before it.
pub fn number(value: f64) -> String {
    let size = value.abs();
    let digits = if size >= 100.0 {
        0
    } else if size >= 10.0 {
        1
    } else if size >= 1.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.digits$}");
    // A zero that a rounding has left a sign is none.
    if text.trim_start_matches(['-', '0', '.']).is_empty() {
        format!("{:.digits$}", 0.0)
    } else {
        text
    }
}

/// `median (min–max)`, or a dash.
pub fn figure(figure: Option<Figure>) -> String {
    match figure {
        None => "–".to_owned(),
        Some(Figure { median, n: 1, .. }) => number(median),
        Some(Figure {
            median, min, max, ..
        }) => {
            format!("{} ({}–{})", number(median), number(min), number(max))
        }
    }
}

/// How many times `reference` it is.
pub fn ratio(figure: Option<Figure>, reference: Option<Figure>) -> String {
    match (figure, reference) {
        // What is about nothing cannot be a measure.
        (Some(figure), Some(reference)) if reference.median > 0.005 => {
            format!("× {:.2}", figure.median / reference.median)
        }
        _ => "–".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        let shown = [0.0123, 0.5, 1.234, 12.34, 123.4, -0.0001].map(number);
        assert_eq!(shown, ["0.012", "0.500", "1.23", "12.3", "123", "0.000"]);
    }

    #[test]
    fn spread_only_where_there_is_one() {
        assert_eq!(figure(None), "–");
        assert_eq!(figure(Figure::of(vec![1.0])), "1.00");
        assert_eq!(figure(Figure::of(vec![1.0, 2.0, 4.0])), "2.00 (1.00–4.00)");
        let (one, two) = (Figure::of(vec![1.0]), Figure::of(vec![2.5]));
        assert_eq!(ratio(two, one), "× 2.50");
        assert_eq!(ratio(two, Figure::of(vec![0.0])), "–");
    }
}
