package conformance

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// mutant is a backend, or a handle, that breaks one promise and keeps all others.
type mutant struct {
	guarantee string // none: it is odd, and right
	breaks    string
	harness   func() Harness
}

// TestMutants runs the suite on broken backends. Each must fail the cases of its own
// guarantee and pass all others: so there is no case that proves nothing, and none that
// proves something else. The odd ones must pass everything.
func TestMutants(t *testing.T) {
	began := time.Now()
	mutants := slices.Concat(deliveryMutants, closeMutants, costMutants, faultMutants, lockMutants, badInputMutants, oddOnes)
	results := make([][]result, len(mutants))
	took := make([]time.Duration, len(mutants))
	slots := make(chan struct{}, 6)
	var wg sync.WaitGroup
	for i, m := range mutants {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			h := m.harness()
			h.Patience, h.Timeout = 3*time.Second, 30*time.Second
			began := time.Now()
			results[i] = collectAll(t, h.filled())
			took[i] = time.Since(began)
		})
	}
	wg.Wait()

	broken := map[string]int{}
	caughtAll := 0
	for i, m := range mutants {
		t.Run(m.name(), func(t *testing.T) {
			failed := map[string][]result{}
			for _, r := range results[i] {
				if len(r.failures) > 0 {
					failed[r.guarantee] = append(failed[r.guarantee], r)
				}
				if r.notCovered != "" {
					t.Errorf("%s/%s is not covered: %s", r.guarantee, r.name, r.notCovered)
				}
			}
			var by []string
			for _, r := range failed[m.guarantee] {
				by = append(by, r.name)
			}
			if m.guarantee != "" {
				broken[m.guarantee]++
				if len(by) == 0 {
					t.Errorf("%s: not caught: %s", m.guarantee, m.breaks)
				} else {
					t.Logf("%-17s %s: caught by %s (%v)", m.guarantee, m.breaks, strings.Join(by, ", "), took[i].Round(10*time.Millisecond))
				}
			} else {
				t.Logf("odd and right: %s (%v)", m.breaks, took[i].Round(10*time.Millisecond))
			}
			delete(failed, m.guarantee)
			for _, g := range slices.Sorted(maps.Keys(failed)) {
				for _, r := range failed[g] {
					t.Errorf("%s: %s: also fails %s", m.name(), m.breaks, strings.Join(r.failures, "\n"))
				}
			}
			if !t.Failed() && m.guarantee != "" {
				caughtAll++
			}
		})
	}
	cases := 0
	for _, g := range guarantees() {
		cases += len(g.cases)
		if broken[g.name] == 0 {
			t.Errorf("%s has no mutant: its cases may prove nothing", g.name)
		}
	}
	t.Logf("%d cases of %d guarantees; %d mutants of %d guarantees, %d caught by their own guarantee alone; %d odd ones pass; %v",
		cases, len(guarantees()), len(mutants)-len(oddOnes), len(broken), caughtAll, len(oddOnes), time.Since(began).Round(100*time.Millisecond))
}

func (m mutant) name() string {
	if m.guarantee == "" {
		return "Odd"
	}
	return m.guarantee
}

// collectAll runs all cases as Run does, and returns what became of them.
func collectAll(tb testing.TB, h Harness) (all []result) {
	var mu sync.Mutex
	run := func(g guarantee, c testCase) {
		r := runCase(tb, h, g, c)
		mu.Lock()
		defer mu.Unlock()
		all = append(all, r)
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 16)
	for _, g := range guarantees() {
		for _, c := range g.cases {
			if g.alone {
				run(g, c)
			}
		}
	}
	for _, g := range guarantees() {
		for _, c := range g.cases {
			if !g.alone {
				wg.Go(func() {
					slots <- struct{}{}
					defer func() { <-slots }()
					run(g, c)
				})
			}
		}
	}
	wg.Wait()
	return all
}

// TestWatchdog shows that a case that hangs, panics or fails elsewhere ends, and says so.
func TestWatchdog(t *testing.T) {
	t.Parallel()
	h := Memory().filled()
	h.Timeout = 50 * time.Millisecond
	for _, c := range []struct {
		what string
		run  func(e *env)
		says string
	}{
		{"a case that hangs until its context ends", func(e *env) { <-e.ctx.Done() }, "goroutine "},
		{"a panic", func(*env) { panic("oops") }, "panic: oops"},
		{"a panic elsewhere", func(e *env) {
			e.start(func() { panic("oops") })
			<-e.ctx.Done()
		}, "panic: oops"},
		{"a failure elsewhere", func(e *env) {
			e.start(func() { e.fatalf("found %d", 3) })
			<-e.ctx.Done()
		}, "found 3\n\tat mutants_test.go:"},
		{"a harness that fails", func(e *env) { e.tb.Fatal("no server") }, "harness: no server"},
	} {
		r := runCase(t, h, guarantee{name: "G"}, testCase{"C", c.run})
		if len(r.failures) != 1 || !strings.Contains(r.failures[0], c.says) {
			t.Errorf("%s: got %q, want one that has %q", c.what, r.failures, c.says)
		}
	}
	r := runCase(t, h, guarantee{name: "G"}, testCase{"C", func(e *env) { e.need(false, "Cut") }})
	if r.notCovered == "" || len(r.failures) > 0 {
		t.Errorf("a case without its hook: %+v", r)
	}
	var s summary
	s.add(r)
	if line := s.line(time.Second); !strings.Contains(line, "1 cases of 1 guarantees in 1s: 0 failed (0 guarantees), 1 NOT COVERED (1 guarantees)") {
		t.Errorf("the summary says %q", line)
	}
}

// TestBareHarness shows what a harness without hooks proves, and that it says what it
// leaves open.
func TestBareHarness(t *testing.T) {
	t.Parallel()
	h := Harness{New: Memory().New}
	open := map[string]bool{}
	for _, r := range collectAll(t, h.filled()) {
		for _, f := range r.failures {
			t.Error(f)
		}
		if r.notCovered != "" {
			open[r.guarantee+"/"+r.name] = true
		}
	}
	want := []string{
		"Accepted/Down", "Blackhole/Silence", "CancelBlocked/Down", "Cleanup/Eternal", "Cleanup/Idle", "CloseDurable/CutOff",
		"CloseDurable/Keep", "CloseLockedUntilExact/Cut", "Cut/Resets", "ExactlyOnce/LostReply", "FenceIncreases/Restart",
		"FenceIncreases/StateLoss", "IdleCost/Quiet", "LockCleanup/Eternal", "LockCleanup/Watches", "LockLossTold/Cut",
		"NoLeak/Subscriptions", "NoSilentLoss/Position", "NoSilentLoss/Retention", "OneUpstream/Handles", "Pause/Stopped", "Restart/Clean",
		"Restart/Kill", "StateLoss/Cut", "StateLoss/Told",
	}
	if got := slices.Sorted(maps.Keys(open)); !slices.Equal(got, want) {
		t.Errorf("not covered: %q, want %q", got, want)
	}
}

// TestWithoutLocks shows that a backend need not have locks: all that is left open then is
// what is about them, and it may be.
func TestWithoutLocks(t *testing.T) {
	t.Parallel()
	h := Harness{New: func(t testing.TB) dchannel.Backend {
		return &struct{ dchannel.Backend }{Memory().New(t)}
	}}
	for _, g := range locks {
		for _, c := range g.cases {
			if r := runCase(t, h.filled(), g, c); len(r.failures) > 0 || r.notCovered == "" {
				t.Errorf("%s/%s: %+v", g.name, c.name, r)
			}
		}
	}
}

// TestNames shows that names are stable and every guarantee has its rule.
func TestNames(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, g := range guarantees() {
		for _, c := range g.cases {
			name := fmt.Sprint(g.name, "/", c.name)
			if seen[name] || g.rule == "" || strings.ToUpper(c.name[:1]) != c.name[:1] {
				t.Errorf("%s is there twice, has no rule, or is not CamelCase", name)
			}
			seen[name] = true
		}
	}
}
