// Package conformance proves that a dchannel backend keeps what dchannel promises. It
// is for everyone who writes a driver:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{
//			New: func(t testing.TB) dchannel.Backend {
//				client := mydb.Connect(addr)
//				t.Cleanup(func() { client.Close() })
//				return mydriver.New(client)
//			},
//			Cut: …,
//		})
//	}
//
// Each promise of the docs is a guarantee with a name (ExactlyOnce, CloseDrains, …), a
// rule in words, and one or more cases. Run makes a subtest of each, so that
//
//	go test -run 'TestConformance/CloseDrains'
//
// runs one. A failure says what was wrong, the rule, and the line of the case. A case
// that hangs is stopped, and the stacks of all goroutines are printed.
//
// A [Harness] also breaks things: it cuts connections, stops the server, makes it lose
// its state. It looks into the server, too, for what is left there. Whatever it cannot
// do is reported as "NOT COVERED" with the guarantee that is unproved without it, and is
// a failure where Harness.Strict is set, or CI. [Memory] is a complete one.
//
// Cases with faults record what publishers were told and what listeners got, and judge
// the record afterwards.
//
// The suite is tested by mutants: for each guarantee there is a backend that breaks it,
// and nothing else, and that guarantee's cases alone must fail. Backends that are
// unusual but right must pass.
package conformance
