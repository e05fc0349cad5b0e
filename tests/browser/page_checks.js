// What a reader would trip over on a page, as lists of words; each is empty on a good page.
() => {
  const found = { overflow: [], cut: [], small: [], outside: [], faint: [], shown: [], unexplained: [] };
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.overflow.push(`page: ${root.scrollWidth} > ${root.clientWidth}`);

  const name = (e) => `${e.tagName.toLowerCase()}.${e.getAttribute("class") ?? ""} "${e.textContent.trim().slice(0, 40)}"`;
  for (const e of document.querySelectorAll("main, main *:not(svg, svg *, style, .unseen)")) {
    if (e.scrollWidth <= e.clientWidth + 1 || getComputedStyle(e).display === "inline") continue;
    const style = getComputedStyle(e), scrolls = /auto|scroll/.test(style.overflowX);
    if (!scrolls) found.cut.push(name(e));
    else if (e.tabIndex !== 0 || e.getAttribute("role") !== "region" || !e.getAttribute("aria-label"))
      found.cut.push(`no keyboard: ${name(e)}`);
    else if (!style.backgroundImage.includes("gradient")) found.cut.push(`no sign: ${name(e)}`);
  }

  const luminance = (rgb) => rgb.map((c) => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = (color) => color.match(/[\d.]+/g)?.map(Number);
  const contrast = (a, b) => {
    const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const line = (() => {  // the colour of grids, which are no lines that one reads
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = "var(--line)";
    const color = getComputedStyle(probe).color;
    probe.remove();
    return color;
  })();
  for (const figure of document.querySelectorAll("figure")) {
    const card = getComputedStyle(figure).backgroundColor;
    const drawn = [...figure.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0);
    if (drawn.length !== 1) found.shown.push(`${drawn.length} drawings of ${name(figure)}`);
    for (const svg of drawn) {
      const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
      for (const text of svg.querySelectorAll("text")) {
        const size = scale * parseFloat(getComputedStyle(text).fontSize), box = text.getBoundingClientRect();
        if (size < 9) found.small.push(`${size.toFixed(1)} px: ${text.textContent}`);
        if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
          found.outside.push(text.textContent);
      }
      for (const part of svg.querySelectorAll("path, use"))
        for (const [kind, opacity] of [["stroke", "strokeOpacity"], ["fill", "fillOpacity"]]) {
          const style = getComputedStyle(part), color = style[kind];
          const solid = style[opacity] === "1" && style.opacity === "1" && !part.closest("defs, clipPath");
          if (!solid || color === "none" || color === card || color === line || (kind === "fill" && !part.hasAttribute("class"))) continue;
          const ratio = contrast(numbers(color), numbers(card));
          if (ratio < 3) found.faint.push(`${color} on ${card}: ${ratio.toFixed(2)}`);
        }
    }
  }
  const explained = [...document.querySelectorAll(".words dt")].map((e) => e.textContent);
  for (const word of ["N_eff", "density", "preserved mass", "Holm", "churn", "perplexity", "beta", "init", "fingerprint"])
    if (document.querySelector("main").innerText.split(/[^\w]/).join(" ").includes(` ${word} `) && !explained.includes(word))
      found.unexplained.push(word);
  for (const key of Object.keys(found)) found[key] = [...new Set(found[key])].slice(0, 6);
  return found;
}
