package conformance

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// guarantee is a promise of the docs, and the cases that prove it.
type guarantee struct {
	name string
	// rule is the promise in the docs' words.
	rule  string
	cases []testCase
	// alone: its cases disturb the whole server, or count what everybody does there.
	alone bool
}

type testCase struct {
	name string
	run  func(e *env)
}

// guarantees returns all of them, in the order of docs/guarantees.md. Another group is
// another file with another slice.
func guarantees() []guarantee {
	var all []guarantee
	for _, group := range [][]guarantee{delivery, closing, cost, faults, locks, badInput} {
		all = append(all, group...)
	}
	return all
}

// Run runs the suite, one subtest for each guarantee, named like it, and in that one
// for each of its cases. Cases that disturb the whole server run first, one by one; the
// others run in parallel, as far as -parallel allows.
func Run(t *testing.T, h Harness) {
	if h.New == nil {
		t.Fatal("conformance: Harness.New is nil")
	}
	h = h.filled()
	strict := h.Strict || isSet("DCHANNEL_STRICT") || isSet("CI")
	var s summary
	began := time.Now()
	// Behind the parallel subtests, which run when this function has returned.
	t.Cleanup(func() { t.Log(s.line(time.Since(began))) })
	for _, g := range guarantees() {
		t.Run(g.name, func(t *testing.T) {
			if !g.alone {
				t.Parallel()
			}
			for _, c := range g.cases {
				t.Run(c.name, func(t *testing.T) {
					if !g.alone {
						t.Parallel()
					}
					r := runCase(t, h, g, c)
					s.add(r)
					for _, line := range r.logs {
						t.Log(line)
					}
					for _, f := range r.failures {
						t.Errorf("%s\n\trule: %s", f, g.rule)
					}
					if r.notCovered != "" {
						line := fmt.Sprintf("NOT COVERED %s: %s (case %s)", g.name, r.notCovered, c.name)
						if strict && !r.optional {
							t.Error(line)
						} else {
							t.Log(line)
						}
					}
				})
			}
		})
	}
}

func isSet(variable string) bool {
	v := os.Getenv(variable)
	return v != "" && v != "0" && !strings.EqualFold(v, "false")
}

// summary counts what Run did.
type summary struct {
	mu                          sync.Mutex
	cases, failed, notCovered   int
	guarantees, without, broken map[string]bool
}

func (s *summary) add(r result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.guarantees == nil {
		s.guarantees, s.without, s.broken = map[string]bool{}, map[string]bool{}, map[string]bool{}
	}
	s.cases++
	s.guarantees[r.guarantee] = true
	if r.notCovered != "" {
		s.notCovered++
		s.without[r.guarantee] = true
	}
	if len(r.failures) > 0 {
		s.failed++
		s.broken[r.guarantee] = true
	}
}

func (s *summary) line(took time.Duration) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("conformance: %d cases of %d guarantees in %v: %d failed (%d guarantees), %d NOT COVERED (%d guarantees)",
		s.cases, len(s.guarantees), took.Round(10*time.Millisecond), s.failed, len(s.broken), s.notCovered, len(s.without))
}
