// Runs the cases that are asked for, or all, and prints the outcome of each as JSON.
export async function report(cases, only, detail = () => undefined) {
  const outcomes = {};
  for (const name of only.length ? only : Object.keys(cases)) {
    try {
      outcomes[name] = await cases[name]();
    } catch (error) {
      outcomes[name] = `${error.constructor.name}: ${JSON.stringify(detail(error)) ?? error.message}`;
    }
  }
  console.log(JSON.stringify(outcomes));
}
